// The panels of a tile: its rows, transposed so that lanes are rows.
#pragma once

#include "panel_block.h"

namespace trianglemix::cpu {
namespace {

template <class V, class Element>
class Panels {
  using Float = typename V::Float;
  static constexpr int64_t kWidth = V::kWidth;

 public:
  static constexpr int64_t kRows = V::kVectors * kWidth;  // of a panel
  static constexpr int64_t kMost = CeilDivide(kMostTileRows, kRows);
  static_assert(kTileRows % kRows == 0, "a tile of a group is a whole number of panels");

  // Where the queries of so many rows, and their limits, are kept.
  static int64_t QueryFloats(int64_t rows, int64_t size) {
    return CeilDivide(rows, kRows) * kRows * (size + 2);
  }
  // Where their sums, peaks and totals are kept.
  static int64_t StateFloats(int64_t rows, int64_t value_size) {
    return CeilDivide(rows, kRows) * kRows * (value_size + 2);
  }

  // `queries` and `state` belong to the whole tile. Without values, `value_size` is 0.
  Panels(const AttentionProblem& problem, const BatchRow& row, const Tile& tile, int64_t value_size,
         float* queries, float* state)
      : size_(problem.head_size),
        value_size_(value_size),
        tile_(tile),
        rows_(problem, row, tile),
        scoring_(rows_.MakeScoring()) {
    for (int64_t first = 0; first < tile.rows; first += kRows)
      panels_[count_++] = MakePanel(first, queries, state);
  }

  int64_t count() const { return count_; }
  const Panel& operator[](int64_t i) const { return panels_[i]; }
  const TileRows& rows() const { return rows_; }
  const Scoring& scoring() const { return scoring_; }

  // Panel `i`, with its sums, peaks and totals in another state.
  Panel WithState(int64_t i, float* state) const {
    Panel panel = panels_[i];
    panel.sums = state + i * kRows * (value_size_ + 2);
    panel.peak = panel.sums + kRows * value_size_;
    panel.total = panel.peak + kRows;
    return panel;
  }

  // Transposes the queries, and clears the sums.
  void Load() {
    for (int64_t i = 0; i < count_; ++i) LoadPanel(panels_[i]);
  }

 private:
  Panel MakePanel(int64_t first, float* queries, float* state) const {
    Panel panel;
    panel.first_row = tile_.first_row + first;
    panel.rows = Smaller(kRows, tile_.rows - first);
    panel.vectors = CeilDivide(panel.rows, kWidth);
    panel.size = size_;
    panel.value_size = value_size_;
    panel.query = queries + first * (size_ + 2);
    panel.low = reinterpret_cast<int32_t*>(panel.query + kRows * size_);
    panel.high = panel.low + kRows;
    panel.sums = state + first * (value_size_ + 2);
    panel.peak = panel.sums + kRows * value_size_;
    panel.total = panel.peak + kRows;
    panel.keys = rows_.Keys(panel.first_row, panel.rows);
    panel.shared = rows_.SharedKeys(panel.first_row, panel.rows);
    return panel;
  }

  // Lanes past the last row repeat it: they are computed and never stored.
  static int64_t RowOfLane(const Panel& panel, int64_t lane) {
    return panel.first_row + Smaller(lane, panel.rows - 1);
  }

  void LoadPanel(const Panel& panel) {
    const int64_t lanes = panel.vectors * kWidth;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      panel.peak[lane] = -kInfinity;
      panel.total[lane] = 0.0f;
      panel.high[lane] = rows_.High(RowOfLane(panel, lane));
      panel.low[lane] = rows_.Low(RowOfLane(panel, lane));
    }
    __builtin_memset(panel.sums, 0, lanes * panel.value_size * sizeof(float));
    for (int64_t lane = 0; lane < lanes; lane += kWidth) LoadLanes(panel, lane);
  }

  // Transposes the queries of kWidth rows.
  void LoadLanes(const Panel& panel, int64_t lane) {
    const int64_t stride = panel.vectors * kWidth;
    float rows[kWidth][kMaxHeadSize] __attribute__((aligned(64)));
    for (int64_t i = 0; i < kWidth; ++i)
      rows_.LoadQuery<V, Element>(RowOfLane(panel, lane + i), rows[i]);
    for (int64_t d = 0; d < panel.size; d += kWidth) {
      Float square[kWidth];
      for (int64_t i = 0; i < kWidth; ++i)
        square[i] = V::Load(rows[i] + d) * V::Splat(scoring_.query_factor);
      Transpose(square);
      for (int64_t i = 0; i < Smaller(kWidth, panel.size - d); ++i)
        V::Store(panel.query + (d + i) * stride + lane, square[i]);
    }
  }

  const int64_t size_;
  const int64_t value_size_;
  const Tile& tile_;
  const TileRows rows_;
  const Scoring scoring_;
  Panel panels_[kMost];
  int64_t count_ = 0;
};

// Calls `body` with the number of vectors of a panel, as a type: a loop is compiled for each.
template <int vectors>
struct VectorCount {
  static constexpr int value = vectors;
};
template <int most, class Body>
void WithVectors(int64_t vectors, Body&& body) {
  if (vectors == most) return body(VectorCount<most>{});
  if constexpr (most > 1) WithVectors<most - 1>(vectors, body);
}

// The keys of a block that a panel's range holds; false where none.
inline bool CutBlock(const Panel& panel, const KeyRange& range, Block* block) {
  const int64_t begin = Larger(block->begin, range.begin);
  if (begin >= Smaller(block->end, range.end)) return false;
  block->keys += (begin - block->begin) * panel.size;
  block->values += (begin - block->begin) * panel.value_size;
  block->begin = begin;
  block->end = Smaller(block->end, range.end);
  return true;
}

}  // namespace
}  // namespace trianglemix::cpu

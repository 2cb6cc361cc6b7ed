// A tile of many rows: its panels, and the blocks of keys that they visit.
#pragma once

#include "panel_block.h"

namespace trianglemix::cpu {
namespace {

template <class V, class Element>
class PanelTile {
  using Float = typename V::Float;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int64_t kPanelRows = V::kVectors * kWidth;
  static constexpr int64_t kPanels = kTileRows / kPanelRows;
  static_assert(kTileRows % kPanelRows == 0, "a tile is a whole number of panels");

 public:
  static size_t StateFloats(const AttentionProblem& p) {
    return kTileRows * (p.value_head_size + 2);
  }
  static size_t ScratchFloats(const AttentionProblem& p) {
    return kTileRows * (p.head_size + 2) +
           kBlockKeys * (kPanelRows + p.head_size + p.value_head_size);
  }

  // The sums are kept in `state`.
  PanelTile(const AttentionProblem& problem, const BatchRow& row, const Tile& tile, float* scratch,
            float* state)
      : problem_(problem),
        tile_(tile),
        rows_(problem, row, tile),
        scoring_(rows_.MakeScoring()),
        scores_(scratch),
        keys_(scores_ + kBlockKeys * kPanelRows),
        values_(keys_ + kBlockKeys * problem.head_size) {
    float* queries = values_ + kBlockKeys * problem.value_head_size;
    for (int64_t first = 0; first < tile.rows; first += kPanelRows)
      panels_[panel_count_++] = MakePanel(first, queries, state);
  }

  // Leaves the sums in the state.
  void Attend() {
    for (int64_t i = 0; i < panel_count_; ++i) LoadPanel(panels_[i]);
    const KeyRanges keys = rows_.Keys(tile_.first_row, tile_.rows);
    VisitRange(keys.sink);
    VisitRange(keys.window);
  }

  // Adds the state of another piece of the tile.
  void Merge(float* state) {
    for (int64_t i = 0; i < panel_count_; ++i) {
      const Panel other = MakePanel(i * kPanelRows, scores_, state);
      for (int64_t v = 0; v < other.vectors; ++v) MergeLanes(panels_[i], other, v * kWidth);
    }
  }

  // Divides the sums by the totals and writes the output rows.
  void StoreOutput() {
    for (int64_t i = 0; i < panel_count_; ++i)
      for (int64_t v = 0; v < panels_[i].vectors; ++v) StoreLanes(panels_[i], v * kWidth);
  }

 private:
  // The panel of rows `first` and on; `queries` and `state` belong to the whole tile.
  Panel MakePanel(int64_t first, float* queries, float* state) const {
    Panel panel;
    panel.first_row = tile_.first_row + first;
    panel.rows = Smaller(kPanelRows, tile_.rows - first);
    panel.vectors = CeilDivide(panel.rows, kWidth);
    panel.size = problem_.head_size;
    panel.value_size = problem_.value_head_size;
    panel.query = queries + first * (panel.size + 2);
    panel.low = reinterpret_cast<int32_t*>(panel.query + kPanelRows * panel.size);
    panel.high = panel.low + kPanelRows;
    panel.sums = state + first * (panel.value_size + 2);
    panel.peak = panel.sums + kPanelRows * panel.value_size;
    panel.total = panel.peak + kPanelRows;
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

  void VisitRange(const KeyRange& range) {
    const int64_t end = Smaller(range.end, tile_.keys.end);
    for (int64_t key = Larger(range.begin, tile_.keys.begin); key < end; key += kBlockKeys)
      VisitBlock({key, Smaller(end, key + kBlockKeys)});
  }

  void VisitBlock(const KeyRange& range) {
    const int64_t size = problem_.head_size, value_size = problem_.value_head_size;
    const Block block = {
        range.begin, range.end,
        rows_.LoadCache<V, Element>(problem_.present_key, range, size, size, keys_),
        rows_.LoadCache<V, Element>(problem_.present_value, range, value_size, value_size,
                                    values_)};
    for (int64_t i = 0; i < panel_count_; ++i) {
      VisitPart(panels_[i], block, panels_[i].keys.sink);
      VisitPart(panels_[i], block, panels_[i].keys.window);
    }
  }

  void VisitPart(const Panel& panel, Block block, const KeyRange& range) {
    const int64_t begin = Larger(block.begin, range.begin);
    if (begin >= Smaller(block.end, range.end)) return;
    block.keys += (begin - block.begin) * panel.size;
    block.values += (begin - block.begin) * panel.value_size;
    block.begin = begin;
    block.end = Smaller(block.end, range.end);
    VisitWith<V::kVectors>(panel, block);
  }

  template <int vectors>
  void VisitWith(const Panel& panel, const Block& block) {
    if (panel.vectors == vectors)
      return PanelBlock<V, vectors>(scoring_, panel, block, scores_).Run();
    if constexpr (vectors > 1) VisitWith<vectors - 1>(panel, block);
  }

  void MergeLanes(const Panel& to, const Panel& from, int64_t lane) {
    const Float peaks[2] = {V::Load(to.peak + lane), V::Load(from.peak + lane)};
    const Float peak = V::Max(peaks[0], peaks[1]);
    const Float base = peak == V::Splat(-kInfinity) ? Float{} : peak;
    const Float factors[2] = {V::Exp2(peaks[0] - base), V::Exp2(peaks[1] - base)};
    const auto add = [&](float* a, const float* b) {
      V::Store(a, V::Load(a) * factors[0] + V::Load(b) * factors[1]);
    };
    const int64_t stride = to.vectors * kWidth;
    for (int64_t d = 0; d < to.value_size; ++d)
      add(to.sums + d * stride + lane, from.sums + d * stride + lane);
    add(to.total + lane, from.total + lane);
    V::Store(to.peak + lane, peak);
  }

  // Transposes the sums of kWidth rows back. A row that kept no key has a total of zero.
  void StoreLanes(const Panel& panel, int64_t lane) {
    const int64_t size = panel.value_size, stride = panel.vectors * kWidth;
    const Float total = V::Load(panel.total + lane);
    const Float factor = total == Float{} ? Float{} : V::Splat(1.0f) / total;
    float rows[kWidth][kMaxHeadSize] __attribute__((aligned(64)));
    for (int64_t d = 0; d < size; d += kWidth) {
      Float square[kWidth] = {};
      for (int64_t i = 0; i < Smaller(kWidth, size - d); ++i)
        square[i] = V::Load(panel.sums + (d + i) * stride + lane) * factor;
      Transpose(square);
      for (int64_t i = 0; i < kWidth; ++i) V::Store(rows[i] + d, square[i]);
    }
    for (int64_t i = 0; i < Smaller(kWidth, panel.rows - lane); ++i)
      rows_.StoreOutput<V, Element>(panel.first_row + lane + i, rows[i]);
  }

  const AttentionProblem& problem_;
  const Tile& tile_;
  const GroupRows rows_;
  const Scoring scoring_;
  float* scores_;
  float* keys_;
  float* values_;
  Panel panels_[kPanels];
  int64_t panel_count_ = 0;
};

}  // namespace
}  // namespace trianglemix::cpu

// One tile of the plan: its panels of rows, and the blocks of keys that they visit.
#pragma once

#include "attend.h"
#include "panel_block.h"

namespace trianglemix::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

template <class V, class Element>
class TileKernel {
  using Float = typename V::Float;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int64_t kPanelRows = V::kVectors * kWidth;
  static constexpr int64_t kPanels = kTileRows / kPanelRows;
  static_assert(kTileRows % kPanelRows == 0, "a tile is a whole number of panels");

 public:
  static size_t PartialFloats(const TriangleProblem& p) {
    return kTileRows * (p.value_head_size + 2);
  }
  static size_t ScratchFloats(const TriangleProblem& p) {
    return PartialFloats(p) + kTileRows * (p.head_size + 2) +
           kBlockKeys * (kPanelRows + p.head_size + p.value_head_size);
  }

  // `state` holds the sums: the scratch's own part, or a partial result.
  TileKernel(const TriangleProblem& problem, const BatchRow& row, const Tile& tile, float* scratch,
             float* state)
      : problem_(problem),
        row_(row),
        tile_(tile),
        group_(problem.num_heads / problem.kv_num_heads) {
    if (state == nullptr) {
      state = scratch;
      scratch += PartialFloats(problem);
    }
    scoring_.head_size = problem.head_size;
    scoring_.value_head_size = problem.value_head_size;
    scoring_.base = Position(tile.first_row);
    scoring_.sink_end = row.first_valid + problem.pattern.sink;
    scoring_.softcap = problem.softcap * kLog2E;
    scores_ = scratch;
    keys_ = scores_ + kBlockKeys * kPanelRows;
    values_ = keys_ + kBlockKeys * problem.head_size;
    scratch = values_ + kBlockKeys * problem.value_head_size;
    for (int64_t first = 0; first < tile.rows; first += kPanelRows)
      panels_[panel_count_++] = MakePanel(first, scratch, state);
  }

  // Leaves the sums in the state.
  void Attend() {
    for (int64_t i = 0; i < panel_count_; ++i) LoadPanel(panels_[i]);
    const KeyRanges keys = KeysOf(tile_.first_row, tile_.rows);
    VisitRange(keys.sink);
    VisitRange(keys.window);
  }

  // Adds another piece's state, which is used up.
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
  int64_t Position(int64_t row) const { return row_.start + row / group_; }

  KeyRanges KeysOf(int64_t first_row, int64_t rows) const {
    return KeysOfRows(problem_.pattern, tile_.dense, Position(first_row),
                      Position(first_row + rows - 1), row_.first_valid);
  }

  // Where row `row` of the group lies in a [B, S, H, size] tensor.
  int64_t Offset(int64_t row, int64_t size) const {
    const int64_t token = tile_.batch * problem_.query_length + row / group_;
    return (token * problem_.num_heads + tile_.kv_head * group_ + row % group_) * size;
  }

  // The panel of rows `first` and on; `queries` and `state` belong to the whole tile.
  Panel MakePanel(int64_t first, float* queries, float* state) const {
    Panel panel;
    panel.first_row = tile_.first_row + first;
    panel.rows = Smaller(kPanelRows, tile_.rows - first);
    panel.vectors = CeilDivide(panel.rows, kWidth);
    panel.query = queries + first * (problem_.head_size + 2);
    panel.low = reinterpret_cast<int32_t*>(panel.query + kPanelRows * problem_.head_size);
    panel.high = panel.low + kPanelRows;
    panel.sums = state + first * (problem_.value_head_size + 2);
    panel.peak = panel.sums + kPanelRows * problem_.value_head_size;
    panel.total = panel.peak + kPanelRows;
    panel.keys = KeysOf(panel.first_row, panel.rows);
    const int64_t last = Position(panel.first_row + panel.rows - 1);
    panel.shared.begin = tile_.dense ? row_.first_valid : last - problem_.pattern.window + 1;
    panel.shared.end = Position(panel.first_row) + 1;
    return panel;
  }

  // Lanes past the last row repeat it: they are computed and never stored.
  void LoadPanel(const Panel& panel) {
    const int64_t lanes = panel.vectors * kWidth;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t after =
          Position(panel.first_row + Smaller(lane, panel.rows - 1)) + 1 - scoring_.base;
      panel.peak[lane] = -kInfinity;
      panel.total[lane] = 0.0f;
      panel.high[lane] = static_cast<int32_t>(after);
      panel.low[lane] =
          tile_.dense ? INT32_MIN
                      : static_cast<int32_t>(Larger(INT32_MIN, after - problem_.pattern.window));
    }
    __builtin_memset(panel.sums, 0, lanes * problem_.value_head_size * sizeof(float));
    for (int64_t lane = 0; lane < lanes; lane += kWidth) LoadLanes(panel, lane);
  }

  // Transposes the queries of kWidth rows.
  void LoadLanes(const Panel& panel, int64_t lane) {
    const int64_t size = problem_.head_size, stride = panel.vectors * kWidth;
    const float scale =
        problem_.softcap != 0.0f ? problem_.scale / problem_.softcap : problem_.scale * kLog2E;
    float rows[kWidth][kMaxHeadSize] __attribute__((aligned(64)));
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = panel.first_row + Smaller(lane + i, panel.rows - 1);
      WidenAll<V>(static_cast<const Element*>(problem_.query) + Offset(row, size), rows[i], size);
    }
    for (int64_t d = 0; d < size; d += kWidth) {
      Float square[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) square[i] = V::Load(rows[i] + d) * V::Splat(scale);
      Transpose(square);
      for (int64_t i = 0; i < Smaller(kWidth, size - d); ++i)
        V::Store(panel.query + (d + i) * stride + lane, square[i]);
    }
  }

  void VisitRange(const KeyRange& range) {
    const int64_t end = Smaller(range.end, tile_.keys.end);
    for (int64_t key = Larger(range.begin, tile_.keys.begin); key < end; key += kBlockKeys)
      VisitBlock({key, Smaller(end, key + kBlockKeys)});
  }

  void VisitBlock(const KeyRange& range) {
    const int64_t head = tile_.batch * problem_.kv_num_heads + tile_.kv_head;
    const int64_t first = head * problem_.present_capacity + range.begin;
    const Block block = {
        range.begin, range.end,
        Floats(problem_.present_key, first, range, problem_.head_size, keys_),
        Floats(problem_.present_value, first, range, problem_.value_head_size, values_)};
    for (int64_t i = 0; i < panel_count_; ++i) {
      VisitPart(panels_[i], block, panels_[i].keys.sink);
      VisitPart(panels_[i], block, panels_[i].keys.window);
    }
  }

  // The rows of `range` of a cache, from row `first` on: where they lie, or widened to `buffer`.
  static const float* Floats(const void* cache, int64_t first, const KeyRange& range, int64_t size,
                             float* buffer) {
    const Element* from = static_cast<const Element*>(cache) + first * size;
    if constexpr (sizeof(Element) == sizeof(float))
      return from;
    else
      return WidenAll<V>(from, buffer, (range.end - range.begin) * size), buffer;
  }

  void VisitPart(const Panel& panel, Block block, const KeyRange& range) {
    const int64_t begin = Larger(block.begin, range.begin);
    if (begin >= Smaller(block.end, range.end)) return;
    block.keys += (begin - block.begin) * problem_.head_size;
    block.values += (begin - block.begin) * problem_.value_head_size;
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
    for (int64_t d = 0; d < problem_.value_head_size; ++d)
      add(to.sums + d * stride + lane, from.sums + d * stride + lane);
    add(to.total + lane, from.total + lane);
    V::Store(to.peak + lane, peak);
  }

  // Transposes the sums of kWidth rows back. A row that kept no key has a total of zero.
  void StoreLanes(const Panel& panel, int64_t lane) {
    const int64_t size = problem_.value_head_size, stride = panel.vectors * kWidth;
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
      NarrowAll<V>(
          rows[i],
          static_cast<Element*>(problem_.output) + Offset(panel.first_row + lane + i, size), size);
  }

  const TriangleProblem& problem_;
  const BatchRow& row_;
  const Tile& tile_;
  const int64_t group_;  // query heads of a key head
  Scoring scoring_;
  Panel panels_[kPanels];
  int64_t panel_count_ = 0;
  float* scores_;
  float* keys_;
  float* values_;
};

// Calls `body` with a value of the problem's element type.
template <class Body>
void WithElement(DType dtype, Body&& body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kFloat16) return body(Float16{});
  return body(BFloat16{});
}

template <class V>
void AttendTile(const TriangleProblem& problem, const BatchRow& row, const Tile& tile,
                float* scratch, float* partial) {
  WithElement(problem.dtype, [&](auto element) {
    TileKernel<V, decltype(element)> kernel(problem, row, tile, scratch, partial);
    kernel.Attend();
    if (partial == nullptr) kernel.StoreOutput();
  });
}

template <class V>
void MergeTile(const TriangleProblem& problem, const BatchRow& row, const Tile& tile,
               float* scratch, float* partials, int64_t pieces) {
  WithElement(problem.dtype, [&](auto element) {
    using Kernel = TileKernel<V, decltype(element)>;
    const size_t floats = Kernel::PartialFloats(problem);
    Kernel kernel(problem, row, tile, scratch, partials);
    for (int64_t piece = 1; piece < pieces; ++piece) kernel.Merge(partials + piece * floats);
    kernel.StoreOutput();
  });
}

template <class V>
constexpr Variant MakeVariant(const char* name) {
  return {name,
          V::kVectors * V::kWidth,
          &TileKernel<V, float>::ScratchFloats,
          &TileKernel<V, float>::PartialFloats,
          &AttendTile<V>,
          &MergeTile<V>};
}

}  // namespace
}  // namespace trianglemix::cpu

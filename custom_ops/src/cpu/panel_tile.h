// A tile of many rows: its panels, and the blocks of keys that they visit.
#pragma once

#include "panels.h"

namespace trianglemix::cpu {
namespace {

template <class V, class Element>
class PanelTile {
  using Float = typename V::Float;
  using TilePanels = Panels<V, Element>;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int64_t kPanelRows = TilePanels::kRows;

 public:
  static size_t StateFloats(const AttentionProblem& p, int64_t rows) {
    return TilePanels::StateFloats(rows, p.value_head_size);
  }
  static size_t ScratchFloats(const AttentionProblem& p) {
    return TilePanels::QueryFloats(kMostTileRows, p.head_size) +
           kBlockKeys * (kPanelRows + p.head_size + p.value_head_size);
  }

  // The sums are kept in `state`.
  PanelTile(const AttentionProblem& problem, const BatchRow& row, const Tile& tile, float* scratch,
            float* state)
      : problem_(problem),
        scores_(scratch),
        keys_(scores_ + kBlockKeys * kPanelRows),
        values_(keys_ + kBlockKeys * problem.head_size),
        panels_(problem, row, tile, problem.value_head_size,
                values_ + kBlockKeys * problem.value_head_size, state) {}

  // Visits the keys of these ranges, and leaves the sums in the state.
  void Attend(const KeyRange* ranges, int64_t count) {
    panels_.Load();
    for (int64_t i = 0; i < count; ++i) VisitRange(ranges[i]);
  }

  // Adds the state of another piece of the tile.
  void Merge(float* state) {
    for (int64_t i = 0; i < panels_.count(); ++i) {
      const Panel other = panels_.WithState(i, state);
      for (int64_t v = 0; v < other.vectors; ++v) MergeLanes(panels_[i], other, v * kWidth);
    }
  }

  // Divides the sums by the totals and writes the output rows.
  void StoreOutput() {
    for (int64_t i = 0; i < panels_.count(); ++i)
      for (int64_t v = 0; v < panels_[i].vectors; ++v) StoreLanes(panels_[i], v * kWidth);
  }

 private:
  void VisitRange(const KeyRange& range) {
    for (int64_t key = range.begin; key < range.end; key += kBlockKeys)
      VisitBlock({key, Smaller(range.end, key + kBlockKeys)});
  }

  void VisitBlock(const KeyRange& range) {
    const int64_t size = problem_.head_size, value_size = problem_.value_head_size;
    const TileRows& rows = panels_.rows();
    const Block block = {
        range.begin, range.end,
        rows.LoadCache<V, Element>(problem_.present_key, range, size, size, keys_),
        rows.LoadCache<V, Element>(problem_.present_value, range, value_size, value_size, values_)};
    for (int64_t i = 0; i < panels_.count(); ++i) {
      VisitPart(panels_[i], block, panels_[i].keys.sink);
      VisitPart(panels_[i], block, panels_[i].keys.window);
    }
  }

  void VisitPart(const Panel& panel, Block block, const KeyRange& range) {
    if (!CutBlock(panel, range, &block)) return;
    WithVectors<V::kVectors>(panel.vectors, [&](auto vectors) {
      PanelBlock<V, vectors.value>(panels_.scoring(), panel, block, scores_).Run();
    });
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
      panels_.rows().template StoreOutput<V, Element>(panel.first_row + lane + i, rows[i]);
  }

  const AttentionProblem& problem_;
  float* scores_;
  float* keys_;
  float* values_;
  TilePanels panels_;
};

}  // namespace
}  // namespace trianglemix::cpu

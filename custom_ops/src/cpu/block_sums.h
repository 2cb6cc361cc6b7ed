// What each block of keys holds of the probabilities of some rows, without a look at the values.
//
// Idea: a block is summed under its own largest score, so that nothing has to be rescaled before
// all blocks are seen: probability = 2^(peak of the block - peak of the row) * sum / total.
// Cost: 2 * D flops and an exponential for each pair of a row and a key; peak and sum of each row
// and block.
#pragma once

#include "panels.h"

namespace trianglemix::cpu {
namespace {

template <class V, class Element>
class BlockSums {
  using Float = typename V::Float;
  using TilePanels = Panels<V, Element>;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int64_t kPanelRows = TilePanels::kRows;
  // Peaks and sums of a panel's rows in one block.
  static constexpr int64_t kBlockFloats = 2 * kPanelRows;

 public:
  static size_t ScratchFloats(const AttentionProblem& p, int64_t blocks) {
    return TilePanels::QueryFloats(kMostTileRows, p.head_size) +
           kBlockKeys * (kPanelRows + p.head_size) + TilePanels::kMost * kBlockFloats * blocks;
  }

  explicit BlockSums(const SumsCall& call)
      : call_(call),
        scores_(call.scratch),
        keys_(scores_ + kBlockKeys * kPanelRows),
        blocks_(keys_ + kBlockKeys * call.problem.head_size),
        panels_(call.problem, call.row, call.tile, 0,
                blocks_ + TilePanels::kMost * kBlockFloats * call.blocks, blocks_) {}

  void Run() {
    panels_.Load();
    const int64_t end = panels_[panels_.count() - 1].keys.window.end;
    for (int64_t block = 0; block < call_.blocks; ++block) {
      const int64_t begin = call_.row.first_valid + block * call_.block_keys;
      VisitBlock(block, {begin, Smaller(end, begin + call_.block_keys)});
    }
    const int64_t groups = CeilDivide(call_.tile.rows, call_.tile.heads * call_.tokens);
    __builtin_memset(call_.sums, 0, groups * call_.tile.heads * call_.blocks * sizeof(float));
    for (int64_t i = 0; i < panels_.count(); ++i) {
      for (int64_t v = 0; v < panels_[i].vectors; ++v) Normalize(At(i, 0) + v * kWidth);
      AddRows(i);
    }
  }

 private:
  float* At(int64_t panel, int64_t block) const {
    return blocks_ + (panel * call_.blocks + block) * kBlockFloats;
  }

  void VisitBlock(int64_t block, const KeyRange& range) {
    for (int64_t i = 0; i < panels_.count(); ++i)
      for (int64_t lane = 0; lane < kPanelRows; ++lane) {
        At(i, block)[lane] = -kInfinity;
        At(i, block)[kPanelRows + lane] = 0.0f;
      }
    for (int64_t key = range.begin; key < range.end; key += kBlockKeys)
      VisitKeys(block, {key, Smaller(range.end, key + kBlockKeys)});
  }

  void VisitKeys(int64_t block, const KeyRange& range) {
    const AttentionProblem& p = call_.problem;
    const Block keys = {range.begin, range.end,
                        panels_.rows().template LoadCache<V, Element>(
                            p.present_key, range, p.head_size, p.head_size, keys_),
                        nullptr};
    for (int64_t i = 0; i < panels_.count(); ++i) {
      Panel panel = panels_[i];
      panel.peak = At(i, block);
      panel.total = panel.peak + kPanelRows;
      Block own = keys;
      if (!CutBlock(panel, panel.keys.window, &own)) continue;
      WithVectors<V::kVectors>(panel.vectors, [&](auto vectors) {
        PanelBlock<V, vectors.value>(panels_.scoring(), panel, own, scores_).Sum();
      });
    }
  }

  // Turns the sums of kWidth rows, each under its block's peak, into probabilities.
  void Normalize(float* lanes) {
    const float* const end = lanes + call_.blocks * kBlockFloats;
    Float peak = V::Splat(-kInfinity);
    for (const float* at = lanes; at < end; at += kBlockFloats) peak = V::Max(V::Load(at), peak);
    peak = peak == V::Splat(-kInfinity) ? Float{} : peak;
    Float total = {};
    for (float* at = lanes; at < end; at += kBlockFloats) {
      const Float sum = V::Load(at + kPanelRows) * V::Exp2(V::Load(at) - peak);
      V::Store(at + kPanelRows, sum);
      total += sum;
    }
    const Float factor = total == Float{} ? Float{} : V::Splat(1.0f) / total;
    for (float* at = lanes; at < end; at += kBlockFloats)
      V::Store(at + kPanelRows, V::Load(at + kPanelRows) * factor);
  }

  // Adds a panel's rows to the sums of their groups and heads, one row after the other.
  void AddRows(int64_t i) {
    const int64_t heads = call_.tile.heads;
    for (int64_t lane = 0; lane < panels_[i].rows; ++lane) {
      const int64_t r = panels_[i].first_row + lane;
      float* to = call_.sums + (r / (heads * call_.tokens) * heads + r % heads) * call_.blocks;
      const float* from = At(i, 0) + kPanelRows + lane;
      for (int64_t b = 0; b < call_.blocks; ++b) to[b] += from[b * kBlockFloats];
    }
  }

  const SumsCall& call_;
  float* scores_;
  float* keys_;
  float* blocks_;  // [panels, blocks, (peak, sum), rows]
  TilePanels panels_;
};

}  // namespace
}  // namespace trianglemix::cpu

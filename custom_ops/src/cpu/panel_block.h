// One block of keys against one panel of rows: the inner loops of the attention, for any vector.
//
// Idea: the lanes of a vector are rows (query heads and tokens), never keys or channels. Queries
// are transposed once, into panels [D, rows]; every key and value is then read where it lies, one
// scalar at a time, and multiplied with a vector of rows:
//     score[key][row]     = sum over d   of K[key][d]       * query[d][row]
//     sum[channel][row]  += sum over key of V[key][channel] * weight[key][row]
// No key or value is transposed or copied (16-bit ones are widened once per tile), and maximum,
// exponential, mask and rescaling of the running softmax are plain vector operations.
// Cost: 2 * (D + Dv) flops for each pair of a row and a visited key.
#pragma once

#include "tile_rows.h"

namespace trianglemix::cpu {
namespace {

// The rows of a tile that one pass over a block computes; every array is [.., vectors * width].
struct Panel {
  int64_t first_row;
  int64_t rows;
  int64_t vectors;
  int64_t size;        // D
  int64_t value_size;  // Dv
  float* query;        // [D, ..], times the scale
  float* sums;         // [Dv, ..]
  float* peak;         // largest score so far
  float* total;        // sum of the weights
  int32_t* low;        // first key of the row's window, counted from the tile's first position
  int32_t* high;       // end of its keys, counted so too
  KeyRanges keys;
  KeyRange shared;  // of the window range, what all rows keep
};

template <class V, int vectors>
class PanelBlock {
  using Float = typename V::Float;
  using Int = typename V::Int;
  using Vectors = Float[vectors];
  static constexpr int kRows = vectors * V::kWidth;
  static constexpr int kStep = V::kStep;

 public:
  PanelBlock(const Scoring& scoring, const Panel& panel, const Block& block, float* scores)
      : scoring_(scoring), panel_(panel), block_(block), scores_(scores) {}

  void Run() {
    Vectors peak, shrink;
    ComputeScores(peak);
    ComputeWeights(peak, shrink);
    for (int64_t d = 0; d < panel_.value_size; d += kStep) AddValues(d, shrink);
  }

  // Peak and total only.
  void Sum() {
    Vectors peak, shrink;
    ComputeScores(peak);
    ComputeWeights(peak, shrink);
  }

 private:
  int count() const { return static_cast<int>(block_.end - block_.begin); }

  // Fills scores_; `peak` becomes the largest score of each row, earlier blocks included.
  void ComputeScores(Vectors& peak) {
    for (int v = 0; v < vectors; ++v) peak[v] = V::Load(panel_.peak + v * V::kWidth);
    int key = 0;
    for (; key + kStep <= count(); key += kStep) {
      if (KeptByAll(block_.begin + key, block_.begin + key + kStep))
        ScoreKeys<true>(key, kStep, peak);
      else
        ScoreKeys<false>(key, kStep, peak);
    }
    if (key < count()) ScoreKeys<false>(key, count() - key, peak);
  }

  bool KeptByAll(int64_t begin, int64_t end) const {
    if (scoring_.softcap != 0.0f) return false;  // takes the slower path, that caps and masks
    return end <= panel_.shared.end && (begin >= panel_.shared.begin || end <= scoring_.sink_end);
  }

  // Scores of `live` keys, at most kStep. A step is always computed whole: where fewer keys are
  // left, the last one is repeated and the copies are dropped.
  template <bool whole>
  void ScoreKeys(int key, int live, Vectors& peak) {
    Float sums[kStep][vectors] = {};
    const int64_t size = panel_.size;
    const float* keys[kStep];
#pragma GCC unroll 16
    for (int k = 0; k < kStep; ++k)
      keys[k] = block_.keys + (key + (whole || k < live ? k : live - 1)) * size;
    const float* query = panel_.query;
    for (int64_t d = 0; d < size; ++d, query += kRows) {
      Vectors q;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) q[v] = V::Load(query + v * V::kWidth);
#pragma GCC unroll 16
      for (int k = 0; k < kStep; ++k) {
        const Float x = V::Splat(whole ? keys[0][k * size + d] : keys[k][d]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[k][v] += x * q[v];
      }
    }
    float* to = scores_ + key * kRows;
#pragma GCC unroll 16
    for (int k = 0; k < kStep; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (whole) peak[v] = V::Max(sums[k][v], peak[v]);
        V::Store(to + k * kRows + v * V::kWidth, sums[k][v]);
      }
    if (!whole) CapAndMask(key, key + live, peak);
  }

  void CapAndMask(int begin, int end, Vectors& peak) {
    for (int key = begin; key < end; ++key)
      for (int v = 0; v < vectors; ++v) {
        float* score = scores_ + key * kRows + v * V::kWidth;
        Float x = scoring_.Cap<V>(V::Load(score));
        x = Kept(block_.begin + key, v) ? x : V::Splat(-kInfinity);
        peak[v] = V::Max(x, peak[v]);
        V::Store(score, x);
      }
  }

  Int Kept(int64_t key, int v) const {
    const Int position = V::SplatInt(static_cast<int32_t>(key - scoring_.base));
    const Int causal = V::LoadInt(panel_.high + v * V::kWidth) > position;
    if (key < scoring_.sink_end) return causal;
    return causal & (V::LoadInt(panel_.low + v * V::kWidth) <= position);
  }

  // Turns the scores into weights and adds them to the totals. `shrink` is the factor of what was
  // summed with the old peak.
  void ComputeWeights(Vectors& peak, Vectors& shrink) {
    Vectors sum = {};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Float before = V::Load(panel_.peak + v * V::kWidth);
      V::Store(panel_.peak + v * V::kWidth, peak[v]);
      // A row without any key so far: -inf - 0 gives weights of zero, -inf - -inf would not.
      peak[v] = peak[v] == V::Splat(-kInfinity) ? Float{} : peak[v];
      shrink[v] = V::Exp2(before - peak[v]);
    }
    for (float* row = scores_; row < scores_ + count() * kRows; row += kRows) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Float weight = V::Exp2(V::Load(row + v * V::kWidth) - peak[v]);
        V::Store(row + v * V::kWidth, weight);
        sum[v] += weight;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* total = panel_.total + v * V::kWidth;
      V::Store(total, V::Load(total) * shrink[v] + sum[v]);
    }
  }

  // Adds the block's values to kStep channels of the sums.
  void AddValues(int64_t channel, const Vectors& shrink) {
    Float sums[kStep][vectors];
    float* to = panel_.sums + channel * kRows;
#pragma GCC unroll 16
    for (int c = 0; c < kStep; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sums[c][v] = V::Load(to + c * kRows + v * V::kWidth) * shrink[v];
    const float* value = block_.values + channel;
    const float* const end = scores_ + count() * kRows;
    for (const float* row = scores_; row < end; row += kRows, value += panel_.value_size) {
      Vectors weight;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) weight[v] = V::Load(row + v * V::kWidth);
#pragma GCC unroll 16
      for (int c = 0; c < kStep; ++c) {
        const Float x = V::Splat(value[c]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[c][v] += x * weight[v];
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kStep; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) V::Store(to + c * kRows + v * V::kWidth, sums[c][v]);
  }

  const Scoring& scoring_;
  const Panel& panel_;
  const Block& block_;
  float* scores_;
};

}  // namespace
}  // namespace trianglemix::cpu

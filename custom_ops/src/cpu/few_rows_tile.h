// A tile of few rows, as a decode step has: the lanes are keys, then channels.
//
// A panel would leave most of its lanes empty, and such a call is bound by reading the cache. Here
// each key is read as vectors: `width` keys times one query row are folded by a tree of additions
// into one vector of scores; values are added as vectors of channels, for all rows at once.
// Cost: the bytes of the visited keys and values, once.
#pragma once

#include "tile_rows.h"

namespace trianglemix::cpu {
namespace {

template <class V, class Element>
class FewRowsTile {
  using Float = typename V::Float;
  using Int = typename V::Int;
  static constexpr int kWidth = V::kWidth;
  static constexpr int64_t kRows = V::kFewRows;
  static_assert(kBlockKeys % kWidth == 0, "a block is a whole number of vectors");

 public:
  static size_t StateFloats(const AttentionProblem& p) {
    return kRows * (Padded(p.value_head_size) + 2);
  }
  static size_t ScratchFloats(const AttentionProblem& p) {
    return kRows * (kBlockKeys + Padded(p.head_size)) +
           kBlockKeys * (Padded(p.head_size) + Padded(p.value_head_size));
  }

  // The sums are kept in `state`.
  FewRowsTile(const AttentionProblem& problem, const BatchRow& row, const Tile& tile,
              float* scratch, float* state)
      : problem_(problem),
        tile_(tile),
        size_(Padded(problem.head_size)),
        value_size_(Padded(problem.value_head_size)),
        rows_(problem, row, tile),
        scoring_(rows_.MakeScoring()),
        scores_(scratch),
        keys_(scores_ + kRows * kBlockKeys),
        values_(keys_ + kBlockKeys * size_),
        queries_(values_ + kBlockKeys * value_size_),
        state_(MakeState(state)) {}

  // Visits the keys of these ranges, and leaves the sums in the state.
  void Attend(const KeyRange* ranges, int64_t count) {
    LoadRows();
    shared_ = rows_.SharedKeys(tile_.first_row, tile_.rows);
    for (int64_t i = 0; i < count; ++i) VisitRange(ranges[i]);
  }

  // Adds the state of another piece of the tile.
  void Merge(float* state) {
    const State other = MakeState(state);
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const float peak = other.peak[r] > state_.peak[r] ? other.peak[r] : state_.peak[r];
      const float own = Shrink(state_.peak[r], peak), their = Shrink(other.peak[r], peak);
      for (int64_t d = r * value_size_; d < (r + 1) * value_size_; ++d)
        state_.sums[d] = state_.sums[d] * own + other.sums[d] * their;
      state_.total[r] = state_.total[r] * own + other.total[r] * their;
      state_.peak[r] = peak;
    }
  }

  // Divides the sums by the totals and writes the output rows.
  void StoreOutput() {
    for (int64_t r = 0; r < tile_.rows; ++r) {
      float* sums = state_.sums + r * value_size_;
      const float factor = state_.total[r] == 0.0f ? 0.0f : 1.0f / state_.total[r];
      for (int64_t d = 0; d < value_size_; ++d) sums[d] *= factor;
      rows_.StoreOutput<V, Element>(tile_.first_row + r, sums);
    }
  }

 private:
  struct State {
    float* sums;   // [rows, Dv padded]
    float* peak;   // largest score of the row so far
    float* total;  // sum of its weights
  };

  static int64_t Padded(int64_t size) { return CeilDivide(size, kWidth) * kWidth; }

  State MakeState(float* state) const {
    float* peak = state + kRows * value_size_;
    return {state, peak, peak + kRows};
  }

  // Factor of what was summed with peak `before`. A row without any key has a peak of -inf.
  static float Shrink(float before, float peak) {
    return before == -kInfinity ? 0.0f : V::Exp2(V::Splat(before - peak))[0];
  }

  void LoadRows() {
    __builtin_memset(queries_, 0, tile_.rows * size_ * sizeof(float));
    __builtin_memset(state_.sums, 0, tile_.rows * value_size_ * sizeof(float));
    for (int64_t r = 0; r < tile_.rows; ++r) {
      float* query = queries_ + r * size_;
      rows_.LoadQuery<V, Element>(tile_.first_row + r, query);
      for (int64_t d = 0; d < size_; ++d) query[d] *= scoring_.query_factor;
      state_.peak[r] = -kInfinity;
      state_.total[r] = 0.0f;
    }
  }

  void VisitRange(const KeyRange& range) {
    for (int64_t key = range.begin; key < range.end; key += kBlockKeys)
      VisitBlock({key, Smaller(range.end, key + kBlockKeys)});
  }

  void VisitBlock(const KeyRange& range) {
    const Block block = {
        range.begin, range.end,
        rows_.LoadCache<V, Element>(problem_.present_key, range, problem_.head_size, size_, keys_),
        rows_.LoadCache<V, Element>(problem_.present_value, range, problem_.value_head_size,
                                    value_size_, values_)};
    float shrink[kRows];
    const int count = static_cast<int>(block.end - block.begin);
    for (int key = 0; key < count; key += kWidth) {
      if (KeptByAll(block, block.begin + key))
        ScoreKeys<true>(block, key, kWidth);
      else
        ScoreKeys<false>(block, key, count - key);
    }
    for (int64_t r = 0; r < tile_.rows; ++r) shrink[r] = ComputeWeights(r, count);
    for (int64_t r = 0; r < tile_.rows; r += kRowsAtOnce)
      AddValuesOf<kRowsAtOnce>(block, r, shrink + r);
  }

  bool KeptByAll(const Block& block, int64_t first) const {
    const int64_t end = first + kWidth;
    return end <= Smaller(block.end, shared_.end) &&
           (first >= shared_.begin || end <= scoring_.sink_end);
  }

  // Scores of kWidth keys, of which `live` are of the block: the others repeat the last one and
  // are dropped.
  template <bool whole>
  void ScoreKeys(const Block& block, int key, int live) {
    const float* keys[kWidth];
    for (int k = 0; k < kWidth; ++k)
      keys[k] = block.keys + (key + (whole || k < live ? k : live - 1)) * size_;
    // The values are next, and then the keys of the next block.
    for (int64_t i = 0; i < kWidth * value_size_; i += 16)
      __builtin_prefetch(block.values + key * value_size_ + i);
    for (int64_t i = 0; i < kWidth * size_; i += 16)
      __builtin_prefetch(block.keys + (key + kBlockKeys) * size_ + i);
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const float* query = queries_ + r * size_;
      Float sums[kWidth] = {};
      for (int64_t d = 0; d < size_; d += kWidth) {
        const Float q = V::Load(query + d);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k)
          sums[k] += V::Load(whole ? keys[0] + k * size_ + d : keys[k] + d) * q;
      }
      Float score = scoring_.Cap<V>(FoldRows(sums));
      if (!whole) score = Kept(block, block.begin + key, r) ? score : V::Splat(-kInfinity);
      V::Store(scores_ + r * kBlockKeys + key, score);
    }
  }

  // Which of the kWidth keys from `first` on row r keeps.
  Int Kept(const Block& block, int64_t first, int64_t r) const {
    const auto relative = [&](int64_t key) {
      return V::SplatInt(static_cast<int32_t>(Clamp(key - scoring_.base, INT32_MIN, INT32_MAX)));
    };
    const Int key = relative(first) + V::Iota();
    const Int window =
        (key >= V::SplatInt(rows_.Low(tile_.first_row + r))) | (key < relative(scoring_.sink_end));
    const Int causal = key < V::SplatInt(rows_.High(tile_.first_row + r));
    return window & causal & (key < relative(block.end));
  }

  // Turns the row's scores into weights; returns the factor of what was summed before.
  float ComputeWeights(int64_t r, int count) {
    float* scores = scores_ + r * kBlockKeys;
    Float top = V::Load(scores);
    for (int key = kWidth; key < count; key += kWidth) top = V::Max(V::Load(scores + key), top);
    const float before = state_.peak[r];
    float peak = before;
    for (int i = 0; i < kWidth; ++i) peak = top[i] > peak ? top[i] : peak;
    const float base = peak == -kInfinity ? 0.0f : peak;
    Float sum = {};
    for (int key = 0; key < count; key += kWidth) {
      const Float weight = V::Exp2(V::Load(scores + key) - V::Splat(base));
      V::Store(scores + key, weight);
      sum += weight;
    }
    const float shrink = Shrink(before, base);
    float total = 0.0f;
    for (int i = 0; i < kWidth; ++i) total += sum[i];
    state_.peak[r] = peak;
    state_.total[r] = state_.total[r] * shrink + total;
    return shrink;
  }

  static constexpr int kRowsAtOnce = kRows < 4 ? kRows : 4;

  template <int rows>
  void AddValuesOf(const Block& block, int64_t first_row, const float* shrink) {
    if (tile_.rows - first_row >= rows) {
      int64_t d = 0;
      for (; d + V::kChannelVectors * kWidth <= value_size_; d += V::kChannelVectors * kWidth)
        AddValues<rows, V::kChannelVectors>(block, first_row, d, shrink);
      for (; d < value_size_; d += kWidth) AddValues<rows, 1>(block, first_row, d, shrink);
    } else if constexpr (rows > 1) {
      AddValuesOf<rows - 1>(block, first_row, shrink);
    }
  }

  // Adds the block's values to `vectors` vectors of channels of `rows` rows.
  template <int rows, int vectors>
  void AddValues(const Block& block, int64_t first_row, int64_t channel, const float* shrink) {
    Float sums[rows][vectors];
    float* to = state_.sums + first_row * value_size_ + channel;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sums[r][v] = V::Load(to + r * value_size_ + v * kWidth) * V::Splat(shrink[r]);
    const float* weights = scores_ + first_row * kBlockKeys;
    const float* value = block.values + channel;
    const int64_t count = block.end - block.begin;
    for (int64_t key = 0; key < count; ++key, value += value_size_) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Float x = V::Load(value + v * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sums[r][v] += x * V::Splat(weights[r * kBlockKeys + key]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) V::Store(to + r * value_size_ + v * kWidth, sums[r][v]);
  }

  const AttentionProblem& problem_;
  const Tile& tile_;
  const int64_t size_;        // D, padded to whole vectors
  const int64_t value_size_;  // Dv, padded
  const TileRows rows_;
  const Scoring scoring_;
  float* scores_;  // [rows, kBlockKeys]
  float* keys_;    // buffers of a block, where it is not read in place
  float* values_;
  float* queries_;  // [rows, D padded], times the scale
  const State state_;
  KeyRange shared_{};
};

}  // namespace
}  // namespace trianglemix::cpu

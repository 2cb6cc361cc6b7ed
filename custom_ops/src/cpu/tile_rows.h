// The rows of a tile: where they stand in the prompt, what they keep, where their tensors lie.
#pragma once

#include "../tiles.h"
#include "attend.h"
#include "cache.h"
#include "simd.h"

namespace trianglemix::cpu {
namespace {

// Keys of a block: 64 keys and values of 64 channels are 32 KiB, the first-level cache.
constexpr int kBlockKeys = 64;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = __builtin_inff();

// Consecutive keys and their values as float32.
struct Block {
  int64_t begin;  // position of the first key
  int64_t end;
  const float* keys;    // [end - begin, D], in few_rows_tile.h padded
  const float* values;  // [end - begin, Dv]
};

// What holds for the whole tile. Scores are in powers of two: a weight is 2^(score - peak).
struct Scoring {
  int64_t base;      // the tile's first position, from which rows' limits count
  int64_t sink_end;  // every row keeps the keys before it that it does not precede
  float query_factor;
  float softcap;  // times log2(e); 0 = off

  // The score of a product of a key and a scaled query.
  template <class V>
  typename V::Float Cap(typename V::Float x) const {
    return softcap == 0.0f ? x : V::Splat(softcap) * Tanh<V>(x);
  }
};

class TileRows {
 public:
  TileRows(const AttentionProblem& problem, const BatchRow& row, const Tile& tile)
      : problem_(problem), row_(row), tile_(tile) {}

  Scoring MakeScoring() const {
    const float cap = problem_.softcap;
    return {Position(tile_.first_row), row_.first_valid + problem_.pattern.sink,
            cap != 0.0f ? problem_.scale / cap : problem_.scale * kLog2E, cap * kLog2E};
  }

  int64_t Position(int64_t r) const { return row_.start + TokenOfRow(tile_, r); }

  // Keys that `rows` rows from `first` on keep between them.
  KeyRanges Keys(int64_t first, int64_t rows) const {
    return KeysOfTile(problem_, row_, tile_, first, rows);
  }

  // Of their window range, the keys that every one of them keeps.
  KeyRange SharedKeys(int64_t first, int64_t rows) const {
    const int64_t last = Position(first + rows - 1);
    const int64_t begin = tile_.dense ? row_.first_valid : last - problem_.pattern.window + 1;
    return {begin, Position(first) + 1};
  }

  // Limits of row r, counted from Scoring::base: it keeps key j when j < High, and j >= Low or j is
  // a sink.
  int32_t High(int64_t r) const {
    return static_cast<int32_t>(Position(r) + 1 - Position(tile_.first_row));
  }
  int32_t Low(int64_t r) const {
    if (tile_.dense) return INT32_MIN;
    return static_cast<int32_t>(Larger(INT32_MIN, High(r) - problem_.pattern.window));
  }

  // The query of row r as floats.
  template <class V, class Element>
  void LoadQuery(int64_t r, float* to) const {
    const Element* from = static_cast<const Element*>(problem_.query);
    WidenAll<V>(from + Offset(r, problem_.head_size), to, problem_.head_size);
  }

  template <class V, class Element>
  void StoreOutput(int64_t r, const float* from) const {
    Element* to = static_cast<Element*>(problem_.output);
    NarrowAll<V>(from, to + Offset(r, problem_.value_head_size), problem_.value_head_size);
  }

  // Rows `keys` of one of the caches as floats, `stride` of them to a key: where they lie, or
  // copied to `buffer` and padded with zeros.
  template <class V, class Element>
  const float* LoadCache(const void* cache, const KeyRange& keys, int64_t size, int64_t stride,
                         float* buffer) const {
    const Element* from = static_cast<const Element*>(cache) +
                          CacheRow(problem_, tile_.batch, tile_.kv_head, keys.begin) * size;
    const int64_t count = keys.end - keys.begin;
    if (stride != size) {
      __builtin_memset(buffer, 0, count * stride * sizeof(float));
      for (int64_t i = 0; i < count; ++i) WidenAll<V>(from + i * size, buffer + i * stride, size);
      return buffer;
    }
    if constexpr (sizeof(Element) == sizeof(float)) return from;
    WidenAll<V>(from, buffer, count * size);
    return buffer;
  }

 private:
  // Where row r lies in a [B, S, H, size] tensor.
  int64_t Offset(int64_t r, int64_t size) const {
    const int64_t token = tile_.batch * problem_.query_length + TokenOfRow(tile_, r);
    return (token * problem_.num_heads + tile_.first_head + r % tile_.heads) * size;
  }

  const AttentionProblem& problem_;
  const BatchRow& row_;
  const Tile& tile_;
};

}  // namespace
}  // namespace trianglemix::cpu

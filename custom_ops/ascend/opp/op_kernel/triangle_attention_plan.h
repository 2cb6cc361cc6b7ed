// Which tokens are live, how they are cut into tiles, and which keys a tile visits: integer
// arithmetic for host and device. Never compiled by CANN.
#pragma once

#include <cstdint>

#include "triangle_attention_tiling_data.h"

#ifndef TRIANGLE_DEVICE  // the kernel defines it as `__aicore__ inline`
#define TRIANGLE_DEVICE inline
#endif

namespace triangle {

// Edge of the cube's fractals, and of every product of tiles.
constexpr int64_t kFractal = 16;
constexpr int64_t kBlockKeys = 128;      // keys of a step of the online softmax
constexpr int64_t kBlockDepth = 128;     // head-size share of a product
constexpr int64_t kLanes = 64;           // float32 lanes of a vector instruction
constexpr int64_t kScoreSlots = 2;       // scores, weights and products in flight
constexpr int64_t kStateVectors = 6;     // of one float32 a row, in the unified buffer
constexpr int64_t kSpread = 8 * kLanes;  // floats that hold a value of each row, eight times
constexpr int64_t kCopyBytes = 8192;     // of a buffer that copies the cache; a row is at most 512
constexpr int64_t kZeroBytes = 512;

TRIANGLE_DEVICE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TRIANGLE_DEVICE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }
TRIANGLE_DEVICE int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
TRIANGLE_DEVICE int64_t RoundUp(int64_t a, int64_t b) { return CeilDivide(a, b) * b; }
TRIANGLE_DEVICE int64_t Clamp(int64_t x, int64_t low, int64_t high) {
  return Larger(low, Smaller(x, high));
}

// The new tokens of one row of the batch: those in [firstToken, denseToken) keep sinks and window,
// those in [denseToken, endToken) everything behind them, all others nothing.
struct RowPlan {
  int64_t start;       // position of token 0
  int64_t firstValid;  // first key
  int64_t firstToken;
  int64_t denseToken;
  int64_t endToken;
};

// The lengths of one row as its inputs give them.
struct RowLengths {
  int64_t end;           // L
  int64_t promptLength;  // N
  int64_t firstValid;
};

// A row whose keys cannot be (no key, more than slots, a gap before its tokens) has no live token.
TRIANGLE_DEVICE bool Possible(const TriangleAttentionTilingData& data, int64_t end) {
  return end >= 1 && end <= data.presentSlots && end - data.queryLength <= data.pastSlots;
}

TRIANGLE_DEVICE RowPlan PlanRow(const TriangleAttentionTilingData& data,
                                const RowLengths& lengths) {
  RowPlan row;
  const int64_t end = Possible(data, lengths.end) ? lengths.end : 0;
  row.start = Larger(0, end - data.queryLength);
  row.firstValid = Larger(0, lengths.firstValid);
  row.endToken = Smaller(data.queryLength, end - row.start);
  row.firstToken = Clamp(row.firstValid - row.start, 0, row.endToken);
  row.denseToken = data.window < 0 ? row.firstToken
                                   : Clamp(lengths.promptLength - data.last - row.start,
                                           row.firstToken, row.endToken);
  return row;
}

// Tokens [firstToken, endToken) of a row, all streaming or all dense.
struct TokenTile {
  int64_t firstToken;
  int64_t endToken;
  bool dense;
};

TRIANGLE_DEVICE int64_t CountTiles(const TriangleAttentionTilingData& data, const RowPlan& row) {
  return CeilDivide(row.denseToken - row.firstToken, data.tileTokens) +
         CeilDivide(row.endToken - row.denseToken, data.tileTokens);
}

// Dense tiles come first: they are the long ones.
TRIANGLE_DEVICE TokenTile TileAt(const TriangleAttentionTilingData& data, const RowPlan& row,
                                 int64_t index) {
  const int64_t denseTiles = CeilDivide(row.endToken - row.denseToken, data.tileTokens);
  TokenTile tile;
  tile.dense = index < denseTiles;
  const int64_t first = tile.dense ? row.denseToken : row.firstToken;
  const int64_t end = tile.dense ? row.endToken : row.denseToken;
  tile.firstToken = first + (tile.dense ? index : index - denseTiles) * data.tileTokens;
  tile.endToken = Smaller(end, tile.firstToken + data.tileTokens);
  return tile;
}

// The keys that a tile visits: positions [firstValid, sinkEnd) and [windowBegin, end). Where the
// two would touch, the first is empty and the second is everything.
struct TileKeys {
  int64_t sinkBegin;
  int64_t sinkEnd;
  int64_t windowBegin;
  int64_t windowEnd;
};

TRIANGLE_DEVICE TileKeys KeysOf(const TriangleAttentionTilingData& data, const RowPlan& row,
                                const TokenTile& tile) {
  TileKeys keys;
  const int64_t sinkEnd = row.firstValid + data.sink;
  const int64_t windowBegin = row.start + tile.firstToken - data.window + 1;
  const bool whole = tile.dense || windowBegin <= sinkEnd;
  keys.sinkBegin = row.firstValid;
  keys.sinkEnd = whole ? row.firstValid : sinkEnd;
  keys.windowBegin = whole ? row.firstValid : windowBegin;
  keys.windowEnd = row.start + tile.endToken;
  return keys;
}

TRIANGLE_DEVICE int64_t CountBlocks(const TileKeys& keys) {
  return CeilDivide(keys.sinkEnd - keys.sinkBegin, kBlockKeys) +
         CeilDivide(keys.windowEnd - keys.windowBegin, kBlockKeys);
}

// `count` keys from position `first` on, at most kBlockKeys.
struct KeyBlock {
  int64_t first;
  int64_t count;
};

TRIANGLE_DEVICE KeyBlock BlockAt(const TileKeys& keys, int64_t index) {
  const int64_t sinkBlocks = CeilDivide(keys.sinkEnd - keys.sinkBegin, kBlockKeys);
  const bool sink = index < sinkBlocks;
  const int64_t end = sink ? keys.sinkEnd : keys.windowEnd;
  KeyBlock block;
  block.first = sink ? keys.sinkBegin + index * kBlockKeys
                     : keys.windowBegin + (index - sinkBlocks) * kBlockKeys;
  block.count = Smaller(kBlockKeys, end - block.first);
  return block;
}

// Bits [low, high) of a word, bounds beyond it cut off.
TRIANGLE_DEVICE uint64_t Bits(int64_t low, int64_t high) {
  low = Clamp(low, 0, kLanes);
  high = Clamp(high, 0, kLanes);
  if (low >= high) return 0;
  const uint64_t upTo = high == kLanes ? ~0ULL : (1ULL << high) - 1;
  return upTo & ~((1ULL << low) - 1);
}

// Lanes [64 * chunk, 64 * chunk + 64) of a block that the token at `position` does not keep: beyond
// the block, ahead of the token, or (streaming) between sinks and window.
TRIANGLE_DEVICE uint64_t DroppedLanes(const TriangleAttentionTilingData& data, const RowPlan& row,
                                      bool dense, int64_t position, const KeyBlock& block,
                                      int64_t chunk) {
  const int64_t origin = block.first + chunk * kLanes;
  uint64_t dropped = Bits(block.first + block.count - origin, kLanes);
  dropped |= Bits(position + 1 - origin, kLanes);
  if (!dense) {
    dropped |= Bits(row.firstValid + data.sink - origin, position - data.window + 1 - origin);
  }
  return dropped;
}

// Whether every token of the tile keeps all kBlockKeys lanes of the block.
TRIANGLE_DEVICE bool FullyKept(const TriangleAttentionTilingData& data, const RowPlan& row,
                               const TokenTile& tile, const KeyBlock& block) {
  const int64_t end = block.first + block.count;
  const bool behind = end <= row.start + tile.firstToken + 1;
  const bool near = tile.dense || end <= row.firstValid + data.sink ||
                    block.first > row.start + tile.endToken - 1 - data.window;
  return block.count == kBlockKeys && behind && near;
}

// A core takes every cores-th item. Of the items [before, before + count) the first that is its.
TRIANGLE_DEVICE int64_t FirstOwned(int64_t before, int64_t core, int64_t cores) {
  return (core - before % cores + cores) % cores;
}

}  // namespace triangle

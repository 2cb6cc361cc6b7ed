// Which tokens are live, how they are cut into tiles, and which keys a tile visits: integer
// arithmetic for host and device. Never compiled by CANN.
#pragma once

#include <cstdint>

#include "tiles.h"  // of custom_ops/src; build.sh puts it beside this file
#include "triangle_attention_tiling_data.h"

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

using trianglemix::BatchRow;
using trianglemix::CeilDivide;
using trianglemix::Clamp;
using trianglemix::KeyRanges;
using trianglemix::Larger;
using trianglemix::Smaller;

TRIANGLEMIX_TILES int64_t RoundUp(int64_t a, int64_t b) { return CeilDivide(a, b) * b; }

TRIANGLEMIX_TILES trianglemix::Pattern PatternOf(const TriangleAttentionTilingData& data) {
  return {data.sink, data.window, data.last};
}

// The lengths of one row as its inputs give them.
struct RowLengths {
  int64_t end;           // L
  int64_t promptLength;  // N
  int64_t firstValid;
};

// A row whose keys cannot be (no key, more than slots, a gap before its tokens) has no live token.
TRIANGLEMIX_TILES bool Possible(const TriangleAttentionTilingData& data, int64_t end) {
  return end >= 1 && end <= data.presentSlots && end - data.queryLength <= data.pastSlots;
}

TRIANGLEMIX_TILES BatchRow PlanRow(const TriangleAttentionTilingData& data,
                                   const RowLengths& lengths) {
  return trianglemix::DescribeRow(PatternOf(data), data.queryLength,
                                  Possible(data, lengths.end) ? lengths.end : 0,
                                  lengths.promptLength, Larger(0, lengths.firstValid));
}

// Tokens [firstToken, endToken) of a row, all streaming or all dense.
struct TokenTile {
  int64_t firstToken;
  int64_t endToken;
  bool dense;
};

TRIANGLEMIX_TILES int64_t CountTiles(const TriangleAttentionTilingData& data, const BatchRow& row) {
  return CeilDivide(row.dense_token - row.first_token, data.tileTokens) +
         CeilDivide(row.end_token - row.dense_token, data.tileTokens);
}

// Dense tiles come first: they are the long ones.
TRIANGLEMIX_TILES TokenTile TileAt(const TriangleAttentionTilingData& data, const BatchRow& row,
                                   int64_t index) {
  const int64_t denseTiles = CeilDivide(row.end_token - row.dense_token, data.tileTokens);
  TokenTile tile;
  tile.dense = index < denseTiles;
  const int64_t first = tile.dense ? row.dense_token : row.first_token;
  const int64_t end = tile.dense ? row.end_token : row.dense_token;
  tile.firstToken = first + (tile.dense ? index : index - denseTiles) * data.tileTokens;
  tile.endToken = Smaller(end, tile.firstToken + data.tileTokens);
  return tile;
}

TRIANGLEMIX_TILES KeyRanges KeysOf(const TriangleAttentionTilingData& data, const BatchRow& row,
                                   const TokenTile& tile) {
  return trianglemix::KeysOfRows(PatternOf(data), tile.dense, row.start + tile.firstToken,
                                 row.start + tile.endToken - 1, row.first_valid);
}

TRIANGLEMIX_TILES int64_t CountBlocks(const KeyRanges& keys) {
  return CeilDivide(keys.sink.end - keys.sink.begin, kBlockKeys) +
         CeilDivide(keys.window.end - keys.window.begin, kBlockKeys);
}

// `count` keys from position `first` on, at most kBlockKeys.
struct KeyBlock {
  int64_t first;
  int64_t count;
};

TRIANGLEMIX_TILES KeyBlock BlockAt(const KeyRanges& keys, int64_t index) {
  const int64_t sinkBlocks = CeilDivide(keys.sink.end - keys.sink.begin, kBlockKeys);
  const bool sink = index < sinkBlocks;
  const int64_t end = sink ? keys.sink.end : keys.window.end;
  KeyBlock block;
  block.first = sink ? keys.sink.begin + index * kBlockKeys
                     : keys.window.begin + (index - sinkBlocks) * kBlockKeys;
  block.count = Smaller(kBlockKeys, end - block.first);
  return block;
}

// Bits [low, high) of a word, bounds beyond it cut off.
TRIANGLEMIX_TILES uint64_t Bits(int64_t low, int64_t high) {
  low = Clamp(low, 0, kLanes);
  high = Clamp(high, 0, kLanes);
  if (low >= high) return 0;
  const uint64_t upTo = high == kLanes ? ~0ULL : (1ULL << high) - 1;
  return upTo & ~((1ULL << low) - 1);
}

// Lanes [64 * chunk, 64 * chunk + 64) of a block that the token at `position` does not keep: beyond
// the block, ahead of the token, or (streaming) between sinks and window.
TRIANGLEMIX_TILES uint64_t DroppedLanes(const TriangleAttentionTilingData& data,
                                        const BatchRow& row, bool dense, int64_t position,
                                        const KeyBlock& block, int64_t chunk) {
  const int64_t origin = block.first + chunk * kLanes;
  uint64_t dropped = Bits(block.first + block.count - origin, kLanes);
  dropped |= Bits(position + 1 - origin, kLanes);
  if (!dense) {
    dropped |= Bits(row.first_valid + data.sink - origin, position - data.window + 1 - origin);
  }
  return dropped;
}

// Whether every token of the tile keeps all kBlockKeys lanes of the block.
TRIANGLEMIX_TILES bool FullyKept(const TriangleAttentionTilingData& data, const BatchRow& row,
                                 const TokenTile& tile, const KeyBlock& block) {
  const int64_t end = block.first + block.count;
  const bool behind = end <= row.start + tile.firstToken + 1;
  const bool near = tile.dense || end <= row.first_valid + data.sink ||
                    block.first > row.start + tile.endToken - 1 - data.window;
  return block.count == kBlockKeys && behind && near;
}

// A core takes every cores-th item. Of the items [before, before + count) the first that is its.
TRIANGLEMIX_TILES int64_t FirstOwned(int64_t before, int64_t core, int64_t cores) {
  return (core - before % cores + cores) % cores;
}

}  // namespace triangle

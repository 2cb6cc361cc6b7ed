// The rule's integer side, for every device: which tiles a call has, and which are sparse. A tile
// is 128 rows, a block 128 keys; tile t and block t hold the slots first_valid + 128 t and on.
#pragma once

#include "../tiles.h"

namespace trianglemix {

constexpr int64_t kBlock = 128;
constexpr int64_t kSampleStep = 16;  // rows 15, 31, ... of a tile are sampled
constexpr int64_t kSamples = kBlock / kSampleStep;

struct BlockRule {
  Pattern pattern;  // sinks and window whose blocks are forced; dense last rows
  float mass;
  int64_t min_length;

  TRIANGLEMIX_HOST_DEVICE constexpr bool is_dense() const {
    return mass >= 1.0f || pattern.window == kDenseWindow;
  }
};

// The tiles [begin, end) of one row of the batch that hold new rows. Those of [sparse_begin,
// sparse_end) choose their blocks; the others keep all. Tokens of the call outside
// [first_token, end_token) keep no key.
struct TiledRow {
  int64_t start;        // slot of token 0
  int64_t end;          // L, end of the keys
  int64_t first_valid;  // first key, where tile 0 begins
  int64_t sampled_end;  // rows at or past it are not sampled
  int64_t first_token, end_token;
  int64_t begin, end_tile;
  int64_t sparse_begin, sparse_end;

  TRIANGLEMIX_HOST_DEVICE constexpr int64_t first_slot(int64_t tile) const {
    return first_valid + kBlock * tile;
  }
  TRIANGLEMIX_HOST_DEVICE constexpr bool is_sparse(int64_t tile) const {
    return sparse_begin <= tile && tile < sparse_end;
  }
};

TRIANGLEMIX_TILES TiledRow DescribeTiles(const BlockRule& rule, int64_t query_length, int64_t end,
                                         int64_t prompt_length, int64_t first_valid) {
  TiledRow row;
  row.start = Larger(0, end - query_length);
  row.end = end;
  row.first_valid = first_valid;
  row.sampled_end = Smaller(prompt_length, end);
  row.end_token = Smaller(query_length, end - row.start);
  row.first_token = Clamp(first_valid - row.start, 0, row.end_token);
  const int64_t before = Larger(0, row.start - first_valid);  // rows of earlier calls
  row.begin = before / kBlock;
  row.end_tile = Larger(row.begin, CeilDivide(end - first_valid, kBlock));
  // Whole in this call from its first row on, its first sample in the prompt, and before the last
  // rows: 128 (t + 1) <= N - last.
  const int64_t sampled = CeilDivide(row.sampled_end - first_valid - (kSampleStep - 1), kBlock);
  const int64_t streaming = (prompt_length - rule.pattern.last - first_valid) / kBlock;
  const bool dense = rule.is_dense() || prompt_length - first_valid <= rule.min_length ||
                     prompt_length - rule.pattern.last < first_valid;
  row.sparse_begin = Smaller(row.end_tile, CeilDivide(before, kBlock));
  const int64_t sparse_end = dense ? 0 : Smaller(sampled, streaming);
  row.sparse_end = Clamp(sparse_end, row.sparse_begin, row.end_tile);
  return row;
}

// Whether a tile keeps a block whatever it holds.
TRIANGLEMIX_TILES bool IsForced(const Pattern& pattern, int64_t tile, int64_t block) {
  const int64_t distance = kBlock * tile - pattern.window + 1;
  const int64_t near = distance < 0 ? 0 : distance / kBlock;
  return kBlock * block < pattern.sink || block >= near;
}

}  // namespace trianglemix

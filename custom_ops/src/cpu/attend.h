// What the work loop and the kernels of each instruction set share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "../tiles.h"
#include "tile.h"

namespace trianglemix::cpu {

struct TileCall {
  const AttentionProblem& problem;
  const BatchRow& row;
  const Tile& tile;
  const KeyRange* ranges;  // the keys that it visits
  int64_t range_count;
  float* scratch;
  // Where the tile's sums are kept. With merged_pieces == 0 they are computed; a tile that is not
  // split also writes its output. Otherwise the states of that many pieces follow each other,
  // and are merged and written.
  float* state;
  int64_t merged_pieces;
};

// Rows whose probabilities are summed over blocks of keys. The rows of `tokens` following tokens of
// the tile are added up, each head for itself.
struct SumsCall {
  const AttentionProblem& problem;
  const BatchRow& row;
  const Tile& tile;  // dense
  int64_t tokens;
  int64_t block_keys;  // of a block, counted from the row's first key: a multiple of 64
  int64_t blocks;      // that hold the tile's keys
  float* scratch;
  float* sums;  // [groups of tokens, heads, blocks]
};

// The kernel of one instruction set.
struct Variant {
  const char* name;
  int64_t panel_rows;  // rows that share a visit to a key
  size_t (*scratch_floats)(const AttentionProblem& problem);
  size_t (*state_floats)(const AttentionProblem& problem, int64_t rows);  // of a tile
  void (*run)(const TileCall& call);
  size_t (*sums_scratch_floats)(const AttentionProblem& problem, int64_t blocks);
  void (*sum_blocks)(const SumsCall& call);
};

// The kernel for this processor.
const Variant& ChooseVariant();

extern const Variant kPlainVariant;
#if defined(__x86_64__)
extern const Variant kAvx2Variant;
extern const Variant kAvx512Variant;
#endif

}  // namespace trianglemix::cpu

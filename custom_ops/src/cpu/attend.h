// What the work loop and the kernels of each instruction set share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "../tiles.h"
#include "plan.h"

namespace trianglemix::cpu {

struct TileCall {
  const AttentionProblem& problem;
  const BatchRow& row;
  const Tile& tile;
  float* scratch;
  // Where the tile's sums are kept. With merged_pieces == 0 they are computed; a tile that is not
  // split also writes its output. Otherwise the states of that many pieces follow each other,
  // and are merged and written.
  float* state;
  int64_t merged_pieces;
};

// The kernel of one instruction set.
struct Variant {
  const char* name;
  int64_t panel_rows;  // rows that share a visit to a key
  size_t (*scratch_floats)(const AttentionProblem& problem);
  size_t (*state_floats)(const AttentionProblem& problem);
  void (*run)(const TileCall& call);
};

// The kernel for this processor.
const Variant& ChooseVariant();

extern const Variant kPlainVariant;
#if defined(__x86_64__)
extern const Variant kAvx2Variant;
extern const Variant kAvx512Variant;
#endif

}  // namespace trianglemix::cpu

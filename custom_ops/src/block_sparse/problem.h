// One call of BlockSparseAttention as a kernel sees it.
#pragma once

#include "../problem.h"
#include "rule.h"

namespace trianglemix {

// `pattern` holds the sinks and the window whose blocks are forced, and the dense last rows.
struct BlockSparseProblem : AttentionProblem {
  float mass;           // of (0, 1]: what the kept blocks hold of the sampled rows' probabilities
  int64_t min_length;   // prompts up to this many tokens are dense
  uint8_t* block_mask;  // [B, H, C, C] (tile, block), C = ceil(T / 128); null where not wanted

  BlockRule rule() const { return {pattern, mass, min_length}; }
};

}  // namespace trianglemix

// The sampled rows of a call: their probabilities in each block, and the blocks that these choose.
#pragma once

#include <vector>

#include "../cpu/kernel.h"
#include "kept_blocks.h"

namespace trianglemix::cpu {

// Chooses the blocks of every sparse tile. The keys must be in the cache; `queries` is the problem
// with queries to read in place. Null on success, else a text.
const char* ChooseBlocks(const AttentionProblem& queries, const BlockSparseProblem& problem,
                         const std::vector<TiledRow>& rows, ParallelFor& pool, KeptBlocks* kept);

}  // namespace trianglemix::cpu

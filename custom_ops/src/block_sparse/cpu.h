// BlockSparseAttention on the CPU: it looks at the sampled rows, then gives the kernels that all
// operators share a schedule of the kept blocks.
#pragma once

#include "../cpu/kernel.h"
#include "problem.h"

namespace trianglemix::cpu {

// Appends the new tokens to the cache, computes the attention, and fills the block mask where it is
// wanted. The lengths of the problem must have been checked. Null on success, else a text that
// lives for ever.
const char* RunBlockSparse(const BlockSparseProblem& problem, ParallelFor& pool);

}  // namespace trianglemix::cpu

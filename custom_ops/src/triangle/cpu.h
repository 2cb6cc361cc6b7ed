// TriangleAttention on the CPU: its schedule for the kernels that all operators share.
#pragma once

#include "../cpu/kernel.h"

namespace trianglemix::cpu {

// Rows visit their sinks and windows, the last ones all keys.
class TriangleSchedule final : public Schedule {
 public:
  explicit TriangleSchedule(const AttentionProblem& problem);
  int64_t RangesOf(const Tile& tile, KeyRange* ranges) const override;

 private:
  const AttentionProblem& problem_;
};

// Appends the new tokens to the cache and computes the attention. The lengths of the problem must
// have been checked. Null on success, else a text that lives for ever.
const char* RunTriangle(const AttentionProblem& problem, ParallelFor& pool);

}  // namespace trianglemix::cpu

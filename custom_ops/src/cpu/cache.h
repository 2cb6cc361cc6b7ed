// Where the cache keeps its keys and values.
#pragma once

#include "../problem.h"

namespace trianglemix::cpu {

// The row of a slot in present_key and present_value, counted in rows. Every address in them comes
// from here, for a run of slots of one head: within it rows follow each other.
static inline int64_t CacheRow(const AttentionProblem& p, int64_t batch, int64_t kv_head,
                               int64_t slot) {
  return (batch * p.kv_num_heads + kv_head) * p.present_capacity + slot;
}

}  // namespace trianglemix::cpu

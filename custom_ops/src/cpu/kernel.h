// The CPU kernel's entry: one call of the operator, on any thread pool.
#pragma once

#include <cstddef>

#include "../problem.h"

namespace trianglemix::cpu {

// Runs body(argument, i) for i in [0, count), in any order, on any threads, and waits for all.
// Null on success, else a text. `body` never throws.
class ParallelFor {
 public:
  using Body = void (*)(void* argument, size_t index);
  virtual const char* Run(size_t count, Body body, void* argument) = 0;

 protected:
  ~ParallelFor() = default;
};

// Appends the new tokens to the cache and computes the attention. The lengths of the problem must
// have been checked. Null on success, else a text that lives for ever.
const char* Run(const AttentionProblem& problem, ParallelFor& pool);

}  // namespace trianglemix::cpu

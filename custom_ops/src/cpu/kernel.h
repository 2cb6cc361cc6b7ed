// The CPU kernels' entry: what an operator's schedule says, on any thread pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "plan.h"

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

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

// Aligned for every vector; null where there is no memory.
Floats Allocate(size_t floats);

// Hands `count` pieces of work to the pool's threads, each with scratch of its own: a thread takes
// one after the other. Null on success, else a text.
class Workers {
 public:
  Workers(size_t count, size_t scratch_floats) : count_(count), scratch_floats_(scratch_floats) {}
  virtual ~Workers() = default;
  const char* Run(ParallelFor& pool);

 protected:
  virtual void Compute(size_t index, float* scratch) = 0;  // never throws

 private:
  void Take() noexcept;

  const size_t count_;
  const size_t scratch_floats_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> out_of_memory_{false};
};

// Computes the attention of a call whose new tokens are in the cache. Null on success, else a text
// that lives for ever.
const char* Attend(const AttentionProblem& problem, const Schedule& schedule, ParallelFor& pool);

}  // namespace trianglemix::cpu

#include "kernel.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "append.h"
#include "attend.h"
#include "plan.h"

namespace trianglemix::cpu {
namespace {

constexpr size_t kAlignment = 64;
// More than any pool has threads; an index that finds the tiles taken returns at once.
constexpr size_t kMostWorkers = 256;

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

// Null where there is no memory.
Floats Allocate(size_t floats) {
  const size_t bytes = (floats * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  return Floats(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
}

// The tiles of a call, which the threads take one after the other.
class Work {
 public:
  Work(const AttentionProblem& problem, const Variant& variant)
      : problem_(problem),
        variant_(variant),
        plan_(MakePlan(problem)),
        state_floats_(variant.state_floats(problem)),
        scratch_floats_(variant.scratch_floats(problem) + state_floats_),
        pieces_left_(plan_.splits.size()) {
    for (size_t i = 0; i < plan_.splits.size(); ++i) pieces_left_[i] = plan_.splits[i].pieces;
    if (plan_.results > 0) {
      partials_ = Allocate(plan_.results * state_floats_);
      out_of_memory_ = partials_ == nullptr;
    }
  }

  const char* Run(ParallelFor& pool) {
    ClearDeadTokens();
    const auto body = [](void* argument, size_t) { static_cast<Work*>(argument)->TakeTiles(); };
    const size_t workers = plan_.tiles.size() < kMostWorkers ? plan_.tiles.size() : kMostWorkers;
    if (workers > 0 && !out_of_memory_)
      if (const char* message = pool.Run(workers, body, this)) return message;
    return out_of_memory_ ? "out of memory for the attention's scratch" : nullptr;
  }

 private:
  // Tokens past their row's end, and left pads, keep no key.
  void ClearDeadTokens() {
    const size_t token = problem_.num_heads * problem_.value_head_size * BytesOf(problem_.dtype);
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const BatchRow& row = plan_.batch_rows[b];
      char* output = static_cast<char*>(problem_.output) + b * problem_.query_length * token;
      std::memset(output, 0, row.first_token * token);
      std::memset(output + row.end_token * token, 0,
                  (problem_.query_length - row.end_token) * token);
    }
  }

  // One thread's share. Never throws: ONNX Runtime's pool could not pass it on.
  void TakeTiles() noexcept {
    Floats scratch;
    for (size_t i = next_++; i < plan_.tiles.size(); i = next_++) {
      if (scratch == nullptr) scratch = Allocate(scratch_floats_);
      if (scratch == nullptr) {
        out_of_memory_ = true;
        return;
      }
      ComputeTile(plan_.tiles[i], scratch.get());
    }
  }

  void ComputeTile(const Tile& tile, float* scratch) {
    const BatchRow& row = plan_.batch_rows[tile.batch];
    float* own_state = scratch + scratch_floats_ - state_floats_;
    if (tile.split < 0) return variant_.run({problem_, row, tile, scratch, own_state, 0});
    const Split& split = plan_.splits[tile.split];
    float* states = partials_.get() + split.first_result * state_floats_;
    variant_.run({problem_, row, tile, scratch, states + tile.piece * state_floats_, 0});
    // The thread that finishes the last piece merges them, in the order of the keys.
    if (--pieces_left_[tile.split] == 0)
      variant_.run({problem_, row, tile, scratch, states, split.pieces});
  }

  const AttentionProblem& problem_;
  const Variant& variant_;
  const Plan plan_;
  const size_t state_floats_;
  const size_t scratch_floats_;  // of one thread, with the state of a tile that is not split
  Floats partials_;
  std::vector<std::atomic<int64_t>> pieces_left_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace

const char* Run(const AttentionProblem& problem, ParallelFor& pool) {
  if (const char* message = Append(problem, pool)) return message;
  const AttentionProblem ready =
      problem.prepares_queries() ? problem.with_prepared_queries() : problem;
  return Work(ready, ChooseVariant()).Run(pool);
}

}  // namespace trianglemix::cpu

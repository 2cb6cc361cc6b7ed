// What the kernels' launchers share: device facts, the scratch layout, their entry points.
#pragma once

#include <cuda_runtime_api.h>

#include "../block_sparse/rule.h"
#include "geometry.h"

namespace trianglemix {

struct Scratch;

struct Device {
  int multiprocessors;
  int architecture;  // 10 * major + minor
};

// Facts of the current device; null on success, else an error text.
const char* query_device(Device* device);

// Tiles of the Hopper kernel: rows, keys of a whole tile, keys of the small tile's edge part.
constexpr int sm90_tile_rows = 128;
constexpr int sm90_key_tile(int head_size) { return head_size > 128 ? 48 : 128; }
constexpr int sm90_key_edge(int head_size) { return head_size > 128 ? 48 : 32; }
constexpr int sm90_block_tile(int head_size) { return head_size > 128 ? 64 : 128; }  // of a block

// Tiles of the kernel for any GPU: keys, by the larger of the two head sizes; rows, of heads up to
// 128 where there are enough of them to fill the GPU, and else.
constexpr int sm80_key_tile(int head_size) { return head_size > 128 ? 32 : 64; }
constexpr int sm80_sinks = 16;  // of the first tile; the other keys are the range's edge
constexpr int sm80_many_rows = 128, sm80_few_rows = 64;

enum class Kernel { kSm90, kSm80, kFloat32 };

// The kernel that runs this problem, and its tiles. Sizes only: a captured graph stays right.
Kernel choose_kernel(const AttentionProblem& problem, const Device& device);
Plan make_plan(const AttentionProblem& problem, Kernel kernel, const Device& device);
// ... of items that visit key blocks, each of one head: whoever chooses the blocks lists them.
Plan make_block_plan(const AttentionProblem& problem, Kernel kernel, const Device& device);

// Key heads whose keys and values the L2 cache holds together: at least one.
int cached_heads(const AttentionProblem& problem);

size_t scratch_bytes(const Plan& plan);
Scratch scratch_at(const Plan& plan, void* workspace);

// What the append kernel, which runs first, readies for those behind it: zeroed counters, and the
// list of the plan's items where there is one.
struct Preparation {
  int* counters;
  int counter_count;
  Item* items;
  int item_count;
};

// Each enqueues one launch and returns its error. Attention visits key ranges, or, where the
// scratch has a bit mask, key blocks; those on Hopper alone may lie by pages.
cudaError_t launch_append(const AttentionProblem& problem, const Plan& plan,
                          const Preparation& preparation, cudaStream_t stream);
cudaError_t launch_sm90(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        const Device& device, cudaStream_t stream);
cudaError_t launch_sm90_blocks(const AttentionProblem& problem, const Plan& plan,
                               const Scratch& scratch, const Device& device, cudaStream_t stream);
cudaError_t launch_sm90_pages(const AttentionProblem& problem, const Plan& plan,
                              const Scratch& scratch, const Device& device, cudaStream_t stream);
cudaError_t launch_sm80(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        cudaStream_t stream);
cudaError_t launch_float32(const AttentionProblem& problem, const Plan& plan,
                           const Scratch& scratch, cudaStream_t stream);

inline Lengths lengths_of(const AttentionProblem& problem) {
  return {problem.seqlens_k, problem.prompt_length, problem.first_valid};
}

}  // namespace trianglemix

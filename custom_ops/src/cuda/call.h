// A call of attention over key ranges, from sizes to launches: what operators' entries are made of.
#pragma once

#include "cuda_library.h"
#include "launch.h"

namespace trianglemix {

// Null, or what the kernels do not take.
const char* check_sizes(const AttentionProblem& problem);

// Null, or why kernel `kernel` does not read keys as this problem's lie; null without pages.
const char* check_pages(const AttentionProblem& problem, Kernel kernel);

// Scratch grows a little with the length; asked for in steps, a longer prompt finds that of the one
// before free again, and the allocator need not go to the driver (0.2 ms, more than a prompt of 4K
// takes) at each new length.
size_t whole_steps(size_t bytes);

// What CudaKernels says of workspace_bytes and run. Takes no keys by pages.
size_t attention_workspace(const AttentionProblem& problem);
const char* run_attention(const AttentionProblem& problem, void* workspace, cudaStream_t stream);

cudaError_t launch_attention(Kernel kernel, const AttentionProblem& problem, const Plan& plan,
                             const Scratch& scratch, const Device& device, cudaStream_t stream);

}  // namespace trianglemix

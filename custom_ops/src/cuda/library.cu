// TriangleAttention's symbol: plans a call and enqueues its kernels (append, then attention).
#include "cuda_library.h"
#include "launch.h"
#include "partial.cuh"

namespace trianglemix {
namespace {

const char* check(const AttentionProblem& p) {
  if (p.present_capacity >= kMaxTokens || p.query_length >= kMaxTokens) {
    return "the CUDA kernels take caches and prompts of fewer than 2^29 tokens";
  }
  if (p.batch > 65535) return "the CUDA kernels take at most 65535 batch rows";
  return nullptr;
}

// Scratch grows a little with the length; asked for in steps, a longer prompt finds that of the one
// before free again, and the allocator need not go to the driver (0.2 ms, more than a prompt of 4K
// takes) at each new length.
constexpr size_t kWorkspaceStep = size_t{32} << 20;

size_t workspace_bytes(const AttentionProblem* problem) {
  Device device;
  if (query_device(&device) || check(*problem) || problem->batch * problem->query_length == 0) {
    return 0;
  }
  const size_t bytes = scratch_bytes(make_plan(*problem, choose_kernel(*problem, device), device));
  return (bytes + kWorkspaceStep - 1) / kWorkspaceStep * kWorkspaceStep;
}

cudaError_t launch_attention(Kernel kernel, const AttentionProblem& problem, const Plan& plan,
                             const Scratch& scratch, const Device& device, cudaStream_t stream) {
  switch (kernel) {
    case Kernel::kSm90:
      return launch_sm90(problem, plan, scratch, device, stream);
    case Kernel::kSm80:
      return launch_sm80(problem, plan, scratch, stream);
    default:
      return launch_float32(problem, plan, scratch, stream);
  }
}

const char* run(const AttentionProblem* problem, void* workspace, void* stream_pointer) {
  Device device;
  if (const char* error = query_device(&device)) return error;
  if (const char* error = check(*problem)) return error;
  if (problem->batch * problem->query_length == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const Kernel kernel = choose_kernel(*problem, device);
  const Plan plan = make_plan(*problem, kernel, device);
  const Scratch scratch = scratch_at(plan, workspace);
  cudaError_t e = launch_append(*problem, plan, scratch, stream);
  const AttentionProblem ready =
      problem->prepares_queries() ? problem->with_prepared_queries() : *problem;
  if (e == cudaSuccess) e = launch_attention(kernel, ready, plan, scratch, device, stream);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

const CudaKernels kKernels{TRIANGLEMIX_CUDA_ABI, sizeof(AttentionProblem), workspace_bytes, run};

}  // namespace
}  // namespace trianglemix

extern "C" __attribute__((visibility("default"))) const trianglemix::CudaKernels*
trianglemix_cuda_library() {
  return &trianglemix::kKernels;
}

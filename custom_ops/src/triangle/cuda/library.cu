// TriangleAttention's symbol.
#include "../../cuda/call.h"

namespace trianglemix {
namespace {

size_t workspace_bytes(const AttentionProblem* problem) { return attention_workspace(*problem); }

const char* run(const AttentionProblem* problem, void* workspace, void* stream) {
  return run_attention(*problem, workspace, static_cast<cudaStream_t>(stream));
}

const CudaKernels kKernels{TRIANGLEMIX_CUDA_ABI, sizeof(AttentionProblem), workspace_bytes, run};

}  // namespace
}  // namespace trianglemix

extern "C" __attribute__((visibility("default"))) const trianglemix::CudaKernels*
trianglemix_cuda_library() {
  return &trianglemix::kKernels;
}

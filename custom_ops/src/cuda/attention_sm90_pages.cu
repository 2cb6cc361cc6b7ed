// The Hopper kernel of items that visit key blocks which lie by pages.
#include "sm90_launch.cuh"

namespace trianglemix {

cudaError_t launch_sm90_pages(const AttentionProblem& problem, const Plan& plan,
                              const Scratch& scratch, const Device& device, cudaStream_t stream) {
  return launch_schedule<Schedule::kBlocks, Layout::kPages>(problem, plan, scratch, device, stream);
}

}  // namespace trianglemix

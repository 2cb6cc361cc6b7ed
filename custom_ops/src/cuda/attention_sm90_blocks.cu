// The Hopper kernel of items that visit key blocks.
#include "sm90_launch.cuh"

namespace trianglemix {

cudaError_t launch_sm90_blocks(const AttentionProblem& problem, const Plan& plan,
                               const Scratch& scratch, const Device& device, cudaStream_t stream) {
  return launch_schedule<Schedule::kBlocks>(problem, plan, scratch, device, stream);
}

}  // namespace trianglemix

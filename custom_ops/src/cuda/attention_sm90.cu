// The Hopper kernel of items that visit key ranges.
#include "sm90_launch.cuh"

namespace trianglemix {

cudaError_t launch_sm90(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        const Device& device, cudaStream_t stream) {
  return scratch.bits == nullptr
             ? launch_schedule<Schedule::kRanges>(problem, plan, scratch, device, stream)
             : launch_sm90_blocks(problem, plan, scratch, device, stream);
}

}  // namespace trianglemix

// The Hopper kernel of items that visit key blocks.
#include "sm90_launch.cuh"

namespace trianglemix {

cudaError_t launch_sm90_blocks(const AttentionProblem& problem, const Plan& plan,
                               const Scratch& scratch, const Device& device, cudaStream_t stream) {
  return problem.is_paged()
             ? launch_sm90_pages(problem, plan, scratch, device, stream)
             : launch_schedule<Schedule::kBlocks>(problem, plan, scratch, device, stream);
}

}  // namespace trianglemix

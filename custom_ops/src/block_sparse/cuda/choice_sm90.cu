// The choice of blocks on Hopper.
#include "choice_sm90_launch.cuh"

namespace trianglemix {

cudaError_t launch_choice_sm90(const BlockSparseProblem& problem, const ChoiceParams& choice,
                               cudaStream_t stream) {
  return problem.is_paged() ? launch_choice_sm90_pages(problem, choice, stream)
                            : launch_layout<Layout::kWhole>(problem, choice, stream);
}

}  // namespace trianglemix

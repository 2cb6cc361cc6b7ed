// The choice of blocks on Hopper, of keys that lie by pages.
#include "choice_sm90_launch.cuh"

namespace trianglemix {

cudaError_t launch_choice_sm90_pages(const BlockSparseProblem& problem, const ChoiceParams& choice,
                                     cudaStream_t stream) {
  return launch_layout<Layout::kPages>(problem, choice, stream);
}

}  // namespace trianglemix

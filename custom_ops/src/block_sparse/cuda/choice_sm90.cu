// Launches the choice of blocks on Hopper.
#include "../../cuda/tensor_maps.h"
#include "choice_sm90.cuh"

namespace trianglemix {
namespace {

template <typename T, typename Tile>
cudaError_t launch(const BlockSparseProblem& problem, const ChoiceParams& choice,
                   cudaStream_t stream) {
  ChoiceSm90Params params;
  params.choice = choice;
  if (!find_encoder()) return cudaErrorNotSupported;
  const cuuint64_t line = 2 * Tile::kD, slots = problem.present_capacity;
  const cuuint64_t heads = problem.batch * problem.kv_num_heads;
  const MapShape keys{
      3, {Tile::kD, slots, heads}, {line, slots * line}, {Tile::kSlabColumns, Tile::kKeys, 1}};
  const bool half = problem.dtype == DType::kFloat16;
  if (!encode_map(&params.key, half, Tile::kSwizzle, problem.present_key, keys)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = choice_sm90<T, Tile>;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
  if (e != cudaSuccess) return e;
  kernel<<<choice.plan.blocks, Tile::kThreads, Tile::kShared, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, int kD>
cudaError_t launch_rows(const BlockSparseProblem& problem, const ChoiceParams& choice,
                        cudaStream_t stream) {
  switch (choice.plan.units * kSamples) {
    case 64:
      return launch<T, ChoiceTile<kD, 64>>(problem, choice, stream);
    case 128:
      return launch<T, ChoiceTile<kD, 128>>(problem, choice, stream);
    default:
      return launch<T, ChoiceTile<kD, choice_most_rows_sm90(kD)>>(problem, choice, stream);
  }
}

template <typename T>
cudaError_t launch_type(const BlockSparseProblem& problem, const ChoiceParams& choice,
                        cudaStream_t stream) {
  switch (choice.plan.head_size) {
    case 64:
      return launch_rows<T, 64>(problem, choice, stream);
    case 96:
      return launch_rows<T, 96>(problem, choice, stream);
    case 128:
      return launch_rows<T, 128>(problem, choice, stream);
    case 256:
      return launch_rows<T, 256>(problem, choice, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_choice_sm90(const BlockSparseProblem& problem, const ChoiceParams& choice,
                               cudaStream_t stream) {
  return problem.dtype == DType::kFloat16 ? launch_type<__half>(problem, choice, stream)
                                          : launch_type<__nv_bfloat16>(problem, choice, stream);
}

}  // namespace trianglemix

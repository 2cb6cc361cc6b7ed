// Launches the choice of blocks on Hopper.
#pragma once

#include "../../cuda/tensor_maps.h"
#include "choice_sm90.cuh"

namespace trianglemix {

template <typename T, typename Tile, Layout kLayout>
cudaError_t launch_tile(const BlockSparseProblem& problem, const ChoiceParams& choice,
                        cudaStream_t stream) {
  ParamsOf<ChoiceSm90Params, kLayout> params;
  params.choice = choice;
  if (!find_encoder()) return cudaErrorNotSupported;
  const cuuint64_t line = 2 * Tile::kD, slots = problem.present_capacity;
  const cuuint64_t heads = problem.batch * problem.kv_num_heads;
  MapShape keys{
      3, {Tile::kD, slots, heads}, {line, slots * line}, {Tile::kSlabColumns, Tile::kKeys, 1}};
  if constexpr (kLayout == Layout::kPages) {
    keys = page_shape(problem, problem.pages.key, Tile::kSlabColumns, Tile::kKeys);
    params.pages = page_table(problem.pages);
  }
  const bool half = problem.dtype == DType::kFloat16;
  if (!encode_map(&params.key, half, Tile::kSwizzle, problem.present_key, keys)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = choice_sm90<T, Tile, kLayout>;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
  if (e != cudaSuccess) return e;
  kernel<<<choice.plan.blocks, Tile::kThreads, Tile::kShared, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, int kD, Layout kLayout>
cudaError_t launch_rows(const BlockSparseProblem& problem, const ChoiceParams& choice,
                        cudaStream_t stream) {
  switch (choice.plan.units * kSamples) {
    case 64:
      return launch_tile<T, ChoiceTile<kD, 64>, kLayout>(problem, choice, stream);
    case 128:
      return launch_tile<T, ChoiceTile<kD, 128>, kLayout>(problem, choice, stream);
    default:
      return launch_tile<T, ChoiceTile<kD, choice_most_rows_sm90(kD)>, kLayout>(problem, choice,
                                                                                stream);
  }
}

template <typename T, Layout kLayout>
cudaError_t launch_head(const BlockSparseProblem& problem, const ChoiceParams& choice,
                        cudaStream_t stream) {
  switch (choice.plan.head_size) {
    case 64:
      return launch_rows<T, 64, kLayout>(problem, choice, stream);
    case 96:
      return launch_rows<T, 96, kLayout>(problem, choice, stream);
    case 128:
      return launch_rows<T, 128, kLayout>(problem, choice, stream);
    case 256:
      return launch_rows<T, 256, kLayout>(problem, choice, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <Layout kLayout>
cudaError_t launch_layout(const BlockSparseProblem& problem, const ChoiceParams& choice,
                          cudaStream_t stream) {
  return problem.dtype == DType::kFloat16
             ? launch_head<__half, kLayout>(problem, choice, stream)
             : launch_head<__nv_bfloat16, kLayout>(problem, choice, stream);
}

}  // namespace trianglemix

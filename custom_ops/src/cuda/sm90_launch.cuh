// Launches the Hopper kernel: tensor maps over the operator's own tensors, one block a
// multiprocessor.
#pragma once

#include <algorithm>

#include "attention_sm90.cuh"
#include "launch.h"
#include "tensor_maps.h"

namespace trianglemix {

constexpr int kEarlyLength = 1024;  // new tokens; from a few thousand on it makes no difference

template <int kD, Schedule kSchedule, Layout kLayout>
bool encode_maps(Sm90Params& params, const AttentionProblem& problem, const Plan& plan) {
  using Tile = Sm90Tile<kD, kSchedule>;
  const bool half = problem.dtype == DType::kFloat16;
  const cuuint64_t line = 2 * kD, d = kD;
  const auto u64 = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const auto u32 = [](int x) { return static_cast<cuuint32_t>(x); };
  const MapShape query{4,
                       {d, u64(plan.heads), u64(plan.length), u64(plan.batch)},
                       {line, plan.heads * line, plan.length * plan.heads * line},
                       {Tile::kSlabColumns, u32(plan.pack), u32(plan.positions), 1}};
  MapShape rows = query;
  rows.box[2] = std::max(1u, 64u / rows.box[1]);
  params.bulk_out = 64 % plan.pack == 0;
  MapShape cache{3,
                 {d, u64(plan.capacity), u64(problem.batch * problem.kv_num_heads), 1},
                 {line, plan.capacity * line, 0},
                 {Tile::kSlabColumns, Tile::kKeys, 1, 1}};
  MapShape keys = cache, values = cache;
  if (kLayout == Layout::kPages) {
    keys = page_shape(problem, problem.pages.key, Tile::kSlabColumns, Tile::kKeys);
    values = page_shape(problem, problem.pages.value, Tile::kSlabColumns, Tile::kKeys);
  }
  const bool good = encode_map(&params.query, half, Tile::kSwizzle, problem.query, query) &&
                    encode_map(&params.out, half, Tile::kSwizzle, problem.output, rows) &&
                    encode_map(&params.key, half, Tile::kSwizzle, problem.present_key, keys) &&
                    encode_map(&params.value, half, Tile::kSwizzle, problem.present_value, values);
  if (!good || !Tile::kHasSmall) return good;
  cache.box[1] = 16;
  return encode_map(&params.key_small, half, Tile::kSwizzle, problem.present_key, cache) &&
         encode_map(&params.value_small, half, Tile::kSwizzle, problem.present_value, cache);
}

template <typename T, int kD, Schedule kSchedule, Layout kLayout>
cudaError_t launch(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                   const Device& device, cudaStream_t stream) {
  using Tile = Sm90Tile<kD, kSchedule>;
  ParamsOf<Sm90Params, kLayout> params;
  if (!find_encoder()) return cudaErrorNotSupported;
  if (!encode_maps<kD, kSchedule, kLayout>(params, problem, plan)) return cudaErrorInvalidValue;
  params.plan = plan;
  params.lengths = lengths_of(problem);
  params.scratch = scratch;
  params.output = problem.output;
  if constexpr (kLayout == Layout::kPages) params.pages = page_table(problem.pages);
  const auto kernel = attention_sm90<T, kD, kSchedule, kLayout>;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
  if (e != cudaSuccess) return e;
  const int blocks = Smaller(device.multiprocessors, plan.items);
  // Where launching counts it may begin while the append kernel ends; it waits for what that wrote.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = Tile::kThreads;
  config.dynamicSmemBytes = Tile::kShared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = plan.length <= kEarlyLength ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <typename T, Schedule kSchedule, Layout kLayout>
cudaError_t launch_type(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        const Device& device, cudaStream_t stream) {
  switch (plan.head_size) {
    case 64:
      return launch<T, 64, kSchedule, kLayout>(problem, plan, scratch, device, stream);
    case 96:
      return launch<T, 96, kSchedule, kLayout>(problem, plan, scratch, device, stream);
    case 128:
      return launch<T, 128, kSchedule, kLayout>(problem, plan, scratch, device, stream);
    case 256:
      return launch<T, 256, kSchedule, kLayout>(problem, plan, scratch, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <Schedule kSchedule, Layout kLayout = Layout::kWhole>
cudaError_t launch_schedule(const AttentionProblem& problem, const Plan& plan,
                            const Scratch& scratch, const Device& device, cudaStream_t stream) {
  return problem.dtype == DType::kFloat16
             ? launch_type<__half, kSchedule, kLayout>(problem, plan, scratch, device, stream)
             : launch_type<__nv_bfloat16, kSchedule, kLayout>(problem, plan, scratch, device,
                                                              stream);
}

}  // namespace trianglemix

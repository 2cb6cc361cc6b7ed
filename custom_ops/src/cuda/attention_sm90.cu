// Launches the Hopper kernel: tensor maps over the operator's own tensors, one block a
// multiprocessor.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention_sm90.cuh"
#include "launch.h"

namespace trianglemix {
namespace {

constexpr int kEarlyLength = 1024;  // new tokens; from a few thousand on it makes no difference

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's encoder, found at run time: the library must load where there is no driver.
Encode find_encoder() {
  static const Encode encode = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                                           cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(symbol)
               : nullptr;
  }();
  return encode;
}

struct MapShape {
  int rank;
  cuuint64_t sizes[4];    // innermost first
  cuuint64_t strides[3];  // bytes, of dimensions 1 ...
  cuuint32_t box[4];
};

bool encode_map(CUtensorMap* map, bool half, int swizzle, const void* base, const MapShape& shape) {
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  const auto type = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return find_encoder()(map, type, shape.rank, const_cast<void*>(base), shape.sizes, shape.strides,
                        shape.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int kD>
bool encode_maps(Sm90Params& params, const AttentionProblem& problem, const Plan& plan) {
  using Tile = Sm90Tile<kD>;
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
  bool good = encode_map(&params.query, half, Tile::kSwizzle, problem.query, query) &&
              encode_map(&params.out, half, Tile::kSwizzle, problem.output, rows) &&
              encode_map(&params.key, half, Tile::kSwizzle, problem.present_key, cache) &&
              encode_map(&params.value, half, Tile::kSwizzle, problem.present_value, cache);
  cache.box[1] = 16;
  return good && encode_map(&params.key_small, half, Tile::kSwizzle, problem.present_key, cache) &&
         encode_map(&params.value_small, half, Tile::kSwizzle, problem.present_value, cache);
}

template <typename T, int kD>
cudaError_t launch(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                   const Device& device, cudaStream_t stream) {
  using Tile = Sm90Tile<kD>;
  Sm90Params params;
  if (!find_encoder()) return cudaErrorNotSupported;
  if (!encode_maps<kD>(params, problem, plan)) return cudaErrorInvalidValue;
  params.plan = plan;
  params.lengths = lengths_of(problem);
  params.scratch = scratch;
  params.output = problem.output;
  const auto kernel = attention_sm90<T, kD>;
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

template <typename T>
cudaError_t launch_type(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        const Device& device, cudaStream_t stream) {
  switch (plan.head_size) {
    case 64:
      return launch<T, 64>(problem, plan, scratch, device, stream);
    case 96:
      return launch<T, 96>(problem, plan, scratch, device, stream);
    case 128:
      return launch<T, 128>(problem, plan, scratch, device, stream);
    case 256:
      return launch<T, 256>(problem, plan, scratch, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_sm90(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        const Device& device, cudaStream_t stream) {
  return problem.dtype == DType::kFloat16
             ? launch_type<__half>(problem, plan, scratch, device, stream)
             : launch_type<__nv_bfloat16>(problem, plan, scratch, device, stream);
}

}  // namespace trianglemix

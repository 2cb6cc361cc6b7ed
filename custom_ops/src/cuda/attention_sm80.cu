// Attention on any GPU from sm_80 on, for 16-bit types and every head size: mma.sync and cp.async.
//
// A block of four warps takes one work item. Q, K and V lie in shared memory with their 16-byte
// pieces swizzled against bank conflicts. Where there are many rows a warp has two strips of 16, so
// that what it reads of K and V serves both, and a tile's values are copied while its scores are
// computed, the next tile's keys while its values are added. Else (decode, short prompts, heads
// above 128) it has one strip, and whole tiles are copied one ahead. Head sizes are padded with
// zeros to kD columns, and slots that hold no key are filled with zeros, so that their bits are
// never seen. Cost: rows * (window + positions + at most kKeys + 16) * 4 * D operations an item.
#include "sm80_block.cuh"

namespace trianglemix {
namespace {

template <typename T, typename Tile, typename Run>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_sm80(const __grid_constant__ Sm80Params params) {
  extern __shared__ __align__(128) char raw[];
  __shared__ Item item;
  if (threadIdx.x == 0) item = params.scratch.items[blockIdx.x];
  __syncthreads();
  if (item.rows == 0) return;
  Sm80Block<T, Tile, Run> block(params, item, shared_address(raw));
  block.attend();
  block.store(reinterpret_cast<int*>(raw + Tile::kShared - 16));
}

template <typename T, typename Tile, typename Run>
cudaError_t launch_run(const Sm80Params& params, cudaStream_t stream) {
  const auto kernel = attention_sm80<T, Tile, Run>;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
  if (e != cudaSuccess) return e;
  kernel<<<params.plan.items, Tile::kThreads, Tile::kShared, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, int kD, int kRows>
cudaError_t launch(const Sm80Params& params, cudaStream_t stream) {
  using Tile = Sm80Tile<kD, kRows>;
  return params.scratch.bits == nullptr ? launch_run<T, Tile, RangeRun<Tile>>(params, stream)
                                        : launch_run<T, Tile, BlockRun<Tile>>(params, stream);
}

template <typename T>
cudaError_t launch_type(const Sm80Params& params, cudaStream_t stream) {
  const int size = Larger(params.plan.head_size, params.plan.value_head_size);
  const bool many = params.plan.tile_rows == sm80_many_rows;
  if (size > 128) return launch<T, 256, sm80_few_rows>(params, stream);
  if (size > 64) {
    return many ? launch<T, 128, sm80_many_rows>(params, stream)
                : launch<T, 128, sm80_few_rows>(params, stream);
  }
  return many ? launch<T, 64, sm80_many_rows>(params, stream)
              : launch<T, 64, sm80_few_rows>(params, stream);
}

}  // namespace

cudaError_t launch_sm80(const AttentionProblem& problem, const Plan& plan, const Scratch& scratch,
                        cudaStream_t stream) {
  const Sm80Params params{plan,          lengths_of(problem), scratch,
                          problem.query, problem.present_key, problem.present_value,
                          problem.output};
  return problem.dtype == DType::kFloat16 ? launch_type<__half>(params, stream)
                                          : launch_type<__nv_bfloat16>(params, stream);
}

}  // namespace trianglemix

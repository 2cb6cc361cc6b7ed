// The choice of blocks in float32 without tensor cores: simple, for checking and for models kept
// so.
//
// A block of four warps takes items of four units, one a warp: eight sampled rows, of which the
// lanes are keys.
#include "../../cuda/float32_rows.cuh"
#include "choose.cuh"

namespace trianglemix {
namespace {

constexpr int kThreads = 128, kKeys = 32, kRows = static_cast<int>(kSamples);
constexpr int kUnits = choice_rows_float32 / kRows;

// The sampled rows of one unit, as UnitSums (choose.cuh) for lanes that are keys.
struct Float32Sums {
  float* sums;  // [32 * words, 8]
  float reference[kRows], whole[kRows], part[kRows];

  __device__ void reset() {
    for (int r = 0; r < kRows; ++r) reference[r] = kNoMax, whole[r] = part[r] = 0.0f;
  }
  // Adds the lane's score of row r (minus infinity where it is masked).
  __device__ __forceinline__ void add(float x, int r, int block, int tile) {
    float best = x;
    for (int k = 16; k; k /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, k));
    if (best - reference[r] > 50.0f) {
      const float factor = exp2f(reference[r] - best);
      for (int b = block + 1 + threadIdx.x % 32; b <= tile; b += 32) sums[b * kRows + r] *= factor;
      reference[r] = best;
      whole[r] *= factor, part[r] *= factor;
      __syncwarp();
    }
    part[r] += warp_sum(exp2f(x - reference[r]));
  }
  __device__ void close(int block) {
    for (int r = 0; r < kRows; ++r) {
      if (threadIdx.x % 32 == 0) sums[block * kRows + r] = part[r];
      whole[r] += part[r];
      part[r] = 0.0f;
    }
    __syncwarp();
  }
};

struct Float32Chooser {
  const ChoiceParams& params;
  float *queries, *keys;  // [4 * 8, pitch], [32, pitch] in shared memory
  const int warp, lane;

  __device__ void load_queries(const ChoiceItem& item) const {
    const ChoicePlan& plan = params.plan;
    const int size = plan.head_size;
    for (int i = threadIdx.x; i < kUnits * kRows * size; i += kThreads) {
      const int r = i / size, c = i % size, unit = r / kRows;
      if (unit >= item.count) continue;
      const int slot = item.first_valid + int{kBlock} * item.tile(plan, unit) +
                       int{kSampleStep} * (r % kRows + 1) - 1;
      const int64_t token = static_cast<int64_t>(item.b) * plan.length + slot - item.start;
      const int64_t line = token * plan.heads + item.head(plan, unit);
      const float* query = static_cast<const float*>(params.query);
      queries[r * pitch(size) + c] = slot < item.sampled_end ? query[line * size + c] : 0.0f;
    }
  }
  __device__ void load_keys(const ChoiceItem& item, int first) const {
    const ChoicePlan& plan = params.plan;
    const int size = plan.head_size;
    const int64_t head = static_cast<int64_t>(item.b) * plan.kv_heads + item.kv_head;
    const float* base = static_cast<const float*>(params.key) + head * plan.capacity * size;
    for (int i = threadIdx.x; i < kKeys * size; i += kThreads) {
      const int r = i / size, c = i % size;
      const bool exists = first + r < plan.capacity;
      keys[r * pitch(size) + c] = exists ? base[static_cast<int64_t>(first + r) * size + c] : 0.0f;
    }
  }
  // Of row r with the lane's key.
  __device__ float score(int r) const {
    const ChoicePlan& plan = params.plan;
    const float* q = queries + (kRows * warp + r) * pitch(plan.head_size);
    const float* k = keys + lane * pitch(plan.head_size);
    return scaled_score(plan, q, k);
  }

  // Of sampled row r, counted from the first of tile 0; -1: there is no such row.
  __device__ static int last_key(const ChoiceItem& item, int tile, int r) {
    const int last = int{kBlock} * tile + int{kSampleStep} * (r + 1) - 1;
    return item.first_valid + last < item.sampled_end ? last : -1;
  }

  __device__ void pass(const ChoiceItem& item) const {
    const ChoicePlan& plan = params.plan;
    const bool active = warp < item.count;
    const int tile = item.tile(plan, Smaller(warp, item.count - 1));
    const int64_t number = static_cast<int64_t>(blockIdx.x) * kUnits + warp;
    Float32Sums sums;
    sums.sums = reinterpret_cast<float*>(params.scratch.sums) + number * 32 * kRows * plan.words;
    sums.reset();
    __syncthreads();
    load_queries(item);
    for (int block = item.last_tile(plan); block >= 0; --block) {
      for (int first = int{kBlock} * block; first < int{kBlock} * (block + 1); first += kKeys) {
        __syncthreads();
        load_keys(item, item.first_valid + first);
        __syncthreads();
        if (!active || block > tile) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int last = last_key(item, tile, r);
          sums.add(first + lane <= last ? score(r) : -INFINITY, r, block, tile);
        }
      }
      if (active && block <= tile) sums.close(block);
    }
    if (!active) return;
    Shares share;
    for (int r = 0; r < kRows; ++r) {
      const bool exists = last_key(item, tile, r) >= 0 && sums.whole[r] > 0.0f;
      share.of[r] = exists ? 1.0f / sums.whole[r] : 0.0f;
    }
    choose_blocks(params, item, warp, sums.sums, share);
  }
};

__global__ void __launch_bounds__(kThreads)
    choice_float32(const __grid_constant__ ChoiceParams params) {
  extern __shared__ __align__(16) float raw32[];
  const ChoicePlan& plan = params.plan;
  fill_rest(params, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads, 4);
  const Float32Chooser chooser{params, raw32, raw32 + kUnits * kRows * pitch(plan.head_size),
                               static_cast<int>(threadIdx.x / 32),
                               static_cast<int>(threadIdx.x % 32)};
  for (int round = 0; round * plan.blocks < plan.items; ++round) {
    const int number = choice_number(plan, blockIdx.x, round);
    if (number >= plan.items) continue;
    const ChoiceItem item = choice_item(plan, params.lengths, number);
    if (item.count > 0) chooser.pass(item);
  }
}

}  // namespace

cudaError_t launch_choice_float32(const ChoiceParams& params, cudaStream_t stream) {
  const int rows = kUnits * kRows + kKeys;
  const int bytes = rows * pitch(params.plan.head_size) * static_cast<int>(sizeof(float));
  const cudaError_t e =
      cudaFuncSetAttribute(choice_float32, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e != cudaSuccess) return e;
  choice_float32<<<params.plan.blocks, kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace trianglemix

// Results of tiles: rows stored to the output, or partial rows stored to scratch and merged.
//
// A tile whose keys are split writes float32 sums, the peak and the weight of each row; the last of
// its shares to arrive adds them up: no second launch, and nothing waits. Cost: one write and one
// read of splits * rows * (Dv + 2) floats.
#pragma once

#include "geometry.h"
#include "softmax.cuh"

namespace trianglemix {

// Device scratch of one call. The append kernel, which runs first, zeroes the counters.
struct Scratch {
  int* next_item;   // the persistent kernel's work counter
  int* arrivals;    // [split tiles, parts]: shares of a tile that have been stored
  float2* weights;  // [split tiles, splits, tile_rows]: peak (base 2 exponent) and sum
  float* sums;      // [split tiles, splits, tile_rows, Dv]
};

constexpr int kTileParts = 2;  // row halves of a tile that count their arrivals separately

// Element offset of tile row `row` in the output [B, S, H * Dv].
__device__ __forceinline__ int64_t output_offset(const Plan& plan, const Item& item, int row) {
  const int64_t token = static_cast<int64_t>(item.b) * plan.length + item.row + row / plan.pack;
  return (token * plan.heads + item.group * plan.pack + row % plan.pack) * plan.value_head_size;
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Called by `threads` threads (named barrier `barrier`) after each has stored its partial rows:
// true for the share that arrives last, which then sees the rows of all others.
__device__ __forceinline__ bool arrives_last(const Scratch& scratch, const Plan& plan,
                                             const Item& item, int part, int barrier, int threads,
                                             int* flag) {
  __threadfence();
  named_barrier_sync(barrier, threads);
  if (threadIdx.x % threads == 0) {
    const int before = atomicAdd(scratch.arrivals + item.slot / plan.splits * kTileParts + part, 1);
    *flag = before == item.splits - 1;
  }
  named_barrier_sync(barrier, threads);
  const bool last = *flag != 0;
  if (last) __threadfence();
  return last;
}

// Adds up tile rows `first`, `first + step`, ... below `stop`, one warp a row.
template <typename T>
__device__ __noinline__ void merge_rows(const Scratch& scratch, const Plan& plan, const Item& item,
                                        T* output, int first, int stop, int step) {
  const int lane = threadIdx.x % 32, size = plan.value_head_size;
  for (int row = first; row < stop; row += step) {
    const int64_t base = static_cast<int64_t>(item.slot) * plan.tile_rows + row;
    float peak = kNoMax;
    for (int k = lane; k < item.splits; k += 32) {
      peak = fmaxf(peak, __ldcg(scratch.weights + base + static_cast<int64_t>(k) * plan.tile_rows).x);
    }
    for (int offset = 16; offset; offset /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, offset));
    }
    float sum = 0.0f, o[8] = {};
#pragma unroll 4
    for (int k = 0; k < item.splits; ++k) {
      const int64_t index = base + static_cast<int64_t>(k) * plan.tile_rows;
      const float2 weight = __ldcg(scratch.weights + index);
      const float factor = exp2_approx(weight.x - peak);
      sum += weight.y * factor;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int column = lane + 32 * c;
        if (column < size) o[c] += __ldcg(scratch.sums + index * size + column) * factor;
      }
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    T* target = output + output_offset(plan, item, row);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int column = lane + 32 * c;
      if (column < size) target[column] = from_float<T>(o[c] * scale);
    }
  }
}

// Stores a lane's fragment rows as partial sums. `row` is the lane's first tile row.
template <int kCount>
__device__ __forceinline__ void store_partial(const Scratch& scratch, const Plan& plan,
                                              const Item& item, const float (&o)[kCount],
                                              const OnlineSoftmax& state, float scale, int row) {
  const int lane = threadIdx.x % 32;
  const int64_t base = static_cast<int64_t>(item.slot + item.split) * plan.tile_rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t index = base + row + 8 * r;
    if ((row + 8 * r) / plan.pack >= item.rows) continue;
    float* target = scratch.sums + index * plan.value_head_size + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      if (8 * j < plan.value_head_size) {
        *reinterpret_cast<float2*>(target + 8 * j) = {o[4 * j + 2 * r], o[4 * j + 2 * r + 1]};
      }
    }
    if (lane % 4 == 0) scratch.weights[index] = {state.peak[r] * scale, state.sum[r]};
  }
}

// Four lanes of a quad hold word j of four 16-byte pieces each; afterwards lane q holds piece q.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int low = bit == 1 ? 2 * k : k, high = low + bit;
      const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? x[low] : x[high], bit);
      if (upper) x[low] = got; else x[high] = got;
    }
  }
}

// Stores a lane's fragment rows, divided by their sums, in 16-byte pieces.
template <typename T, int kCount>
__device__ __forceinline__ void store_rows(const Plan& plan, const Item& item, T* output,
                                           const float (&o)[kCount], const OnlineSoftmax& state,
                                           int row) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool used = (row + 8 * r) / plan.pack < item.rows;
    const float scale = state.sum[r] > 0.0f ? 1.0f / state.sum[r] : 0.0f;
    T* target = output + output_offset(plan, item, row + 8 * r) + 8 * quad;
#pragma unroll
    for (int j = 0; j < kCount / 4; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * (j + k) + 2 * r;
        x[k] = pack2<T>(o[i] * scale, o[i + 1] * scale);
      }
      transpose_quad(x);
      if (used && 8 * (j + quad) < plan.value_head_size) {
        *reinterpret_cast<uint4*>(target + 8 * j) = {x[0], x[1], x[2], x[3]};
      }
    }
  }
}

}  // namespace trianglemix

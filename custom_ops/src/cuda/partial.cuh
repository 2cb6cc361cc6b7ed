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
  int* next_item;        // the persistent kernel's work counter
  int* arrivals;         // [split tiles, parts]: shares of a tile that have been stored
  Item* items;           // [plan.items]
  float2* weights;       // [split tiles, splits, tile_rows]: peak (base 2 exponent) and sum
  float* sums;           // [split tiles, splits, tile_rows, Dv]
  const uint32_t* bits;  // [.., words]: the blocks of items that have any; null for key ranges
  int words;
};

// The set bits of a row of a bit mask, in ascending order, behind an item's skipped ones. There
// must be another one.
struct BlockCursor {
  const uint32_t* next_word;
  uint32_t left = 0;
  int base = -32;

  __device__ __forceinline__ BlockCursor(const uint32_t* bits, int words, const Item& item)
      : next_word(bits + static_cast<int64_t>(item.bits) * words) {
    for (int skipped = item.skipped; skipped > 0;) {
      if (left == 0) left = *next_word++, base += 32;
      const int set = __popc(left);
      if (set <= skipped) {
        left = 0, skipped -= set;
      } else {
        left &= left - 1, --skipped;
      }
    }
  }
  __device__ __forceinline__ int next() {
    while (left == 0) left = *next_word++, base += 32;
    const int bit = __ffs(left) - 1;
    left &= left - 1;
    return base + bit;
  }
};

constexpr int kTileParts = 2;  // strips of 64 rows of a tile count their arrivals separately

// Element offsets in the output [B, S, H * Dv]: of an item's first row, and of a tile row from
// there.
__device__ __forceinline__ int64_t item_offset(const Plan& plan, const Item& item) {
  const int64_t token = static_cast<int64_t>(item.b) * plan.length + item.row;
  return (token * plan.heads + item.group * plan.pack) * plan.value_head_size;
}
__device__ __forceinline__ int position_of_row(const Plan& plan, int row) {
  return row * plan.pack_reciprocal >> 16;
}
__device__ __forceinline__ int tile_row_offset(const Plan& plan, int row) {
  const int position = position_of_row(plan, row);
  return (position * (plan.heads - plan.pack) + row) * plan.value_head_size;
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
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

// What share `lane` of a row counts for in the row's result.
__device__ __forceinline__ float share_factor(const float2* weights, int64_t stride, int splits) {
  const int lane = threadIdx.x % 32;
  const float2 weight = lane < splits ? __ldcg(weights + lane * stride) : float2{kNoMax, 0.0f};
  float peak = weight.x;
  for (int k = 16; k; k /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, k));
  const float factor = exp2_approx(weight.x - peak);
  float sum = weight.y * factor;
  for (int k = 16; k; k /= 2) sum += __shfl_xor_sync(0xffffffff, sum, k);
  return sum > 0.0f ? factor / sum : 0.0f;
}

// Adds up tile rows `first`, `first + 4`, ... below `stop` (one of four warps); splits <= 32. A
// lane adds four columns of kRows rows at a time, whose reads are under way together.
template <typename T>
__device__ __noinline__ void merge_rows(const Scratch& scratch, const Plan& plan, int slot,
                                        int splits, T* output, int first, int stop) {
  constexpr int kRows = 2, kTogether = 2;
  const int lane = threadIdx.x % 32, size = plan.value_head_size;
  const int64_t stride = static_cast<int64_t>(plan.tile_rows) * size;
  for (; first < stop; first += 4 * kRows) {
    int row[kRows];
    float factor[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r] = Smaller(first + 4 * r, stop - 1);  // the last row again, rather than a branch
      factor[r] =
          share_factor(scratch.weights + static_cast<int64_t>(slot) * plan.tile_rows + row[r],
                       plan.tile_rows, splits);
    }
    for (int left = 0; left < size; left += 128) {
      const int column = Smaller(left + 4 * lane, size - 4);
      const float* source = scratch.sums + slot * stride + column;
      float4 o[kRows] = {};
      for (int k = 0; k < splits; k += kTogether) {
        float4 x[kTogether][kRows];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          const float* share = source + Smaller(k + u, splits - 1) * stride;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            x[u][r] = __ldcg(reinterpret_cast<const float4*>(share + row[r] * size));
          }
        }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float weight = __shfl_sync(0xffffffff, factor[r], Smaller(k + u, 31));
            if (k + u >= splits) continue;
            o[r].x += x[u][r].x * weight, o[r].y += x[u][r].y * weight;
            o[r].z += x[u][r].z * weight, o[r].w += x[u][r].w * weight;
          }
        }
      }
      if (left + 4 * lane >= size) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        T* target = output + tile_row_offset(plan, row[r]) + column;
        target[0] = from_float<T>(o[r].x), target[1] = from_float<T>(o[r].y);
        target[2] = from_float<T>(o[r].z), target[3] = from_float<T>(o[r].w);
      }
    }
  }
}

// Stores a lane's fragment rows as partial sums. `row` is the lane's first tile row.
template <int kCount>
__device__ __forceinline__ void store_partial(const Scratch& scratch, const Plan& plan,
                                              const Item& item, const float (&o)[kCount],
                                              const OnlineSoftmax& state, float scale, int row,
                                              const bool (&used)[2]) {
  const int lane = threadIdx.x % 32;
  const int64_t base = static_cast<int64_t>(item.slot + item.split) * plan.tile_rows + row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!used[r]) continue;
    float* target = scratch.sums + (base + 8 * r) * plan.value_head_size + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      if (8 * j < plan.value_head_size) {
        *reinterpret_cast<float2*>(target + 8 * j) = {o[4 * j + 2 * r], o[4 * j + 2 * r + 1]};
      }
    }
    if (lane % 4 == 0) scratch.weights[base + 8 * r] = {state.peak[r] * scale, state.sum[r]};
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
      if (upper)
        x[low] = got;
      else
        x[high] = got;
    }
  }
}

// Stores a lane's fragment rows, divided by their sums, in 16-byte pieces: row r of the lane's two
// at output + offset[r], if used[r].
template <typename T, int kCount>
__device__ __forceinline__ void store_rows(T* output, const float (&o)[kCount],
                                           const OnlineSoftmax& state, const int (&offset)[2],
                                           const bool (&used)[2], int size = 2 * kCount) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float scale = state.sum[r] > 0.0f ? __fdividef(1.0f, state.sum[r]) : 0.0f;
    T* target = output + offset[r] + 8 * quad;
#pragma unroll
    for (int j = 0; j < kCount / 4; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * (j + k) + 2 * r;
        x[k] = pack2<T>(o[i] * scale, o[i + 1] * scale);
      }
      transpose_quad(x);
      if (used[r] && 8 * (j + quad) < size) {
        *reinterpret_cast<uint4*>(target + 8 * j) = {x[0], x[1], x[2], x[3]};
      }
    }
  }
}

}  // namespace trianglemix

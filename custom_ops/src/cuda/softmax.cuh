// Online softmax over score fragments of the tensor cores.
//
// Fragment layout (the same for mma.sync and wgmma): of a 16-row strip, a lane holds rows lane / 4
// and lane / 4 + 8; element 4 * j + 2 * r + e is row r of the two, column 8 * j + 2 * (lane % 4) +
// e.
#pragma once

#include "ptx.cuh"

namespace trianglemix {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNoMax = -1.0e30f;  // finite: a row without a key must not make inf - inf

// Scores to softcap * tanh(scale * score / softcap); the caller then scales by log2(e) alone.
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], float scale, float softcap) {
  const float to_exponent = 2.0f * kLog2E * scale / softcap;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_approx(s[i] * to_exponent);
    s[i] = softcap - __fdividef(2.0f * softcap, 1.0f + e);
  }
}

// Running maximum (of unscaled scores) and sum of a lane's two rows. The maximum is let lag by up
// to 2^kLag: weights stay exact, and most tiles then need no rescaling of the sums so far.
struct OnlineSoftmax {
  static constexpr float kLag = 8.0f;
  float peak[2], sum[2], factor[2];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) peak[r] = kNoMax, sum[r] = 0.0f, factor[r] = 1.0f;
  }

  // Looks for new peaks in both rows at once: their chains hide each other's latency. True if a row
  // has one: then what was summed before is to be multiplied by factor[r] (weigh does so to
  // sum[r]).
  template <int kCount>
  __device__ __forceinline__ bool find_peaks(const float (&s)[kCount], float scale) {
    float high[4];  // rows 0, 1, 0, 1
#pragma unroll
    for (int c = 0; c < 4; ++c) high[c] = fmaxf(s[2 * c], s[2 * c + 1]);
#pragma unroll
    for (int i = 8; i < kCount; i += 2) {
      high[i / 2 % 4] = fmaxf(high[i / 2 % 4], fmaxf(s[i], s[i + 1]));
    }
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = fmaxf(high[r], high[r + 2]);
      best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 2));
      const bool moved = (best - peak[r]) * scale > kLag;
      factor[r] = moved ? exp2_approx((peak[r] - best) * scale) : 1.0f;
      peak[r] = moved ? best : peak[r];
      any |= moved;
    }
    return any;
  }

  // Scores of the lane's row r to weights 2^((s - peak) * scale), in place.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], float scale, int r) {
    const float shift = -peak[r] * scale;
    float part[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i + 2 * r + e];
        x = exp2_approx(fmaf(x, scale, shift));
        part[e] += x;
      }
    }
    sum[r] = sum[r] * factor[r] + (part[0] + part[1]);
  }

  // Makes a row's weights be computed before what follows, beside a matrix product in flight: the
  // assembler would sink them below the wait for it. A branch on the sum, never taken, does.
  __device__ __forceinline__ void settle(int r) const {
    if (sum[r] < 0.0f) __trap();
  }

  // Sums of whole rows, over the four lanes that share them.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
    }
  }
};

template <int kCount>
__device__ __forceinline__ void rescale(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[(i / 2) % 2];
}

// Weights as operand A of the next product: registers 4 * k .. 4 * k + 3 hold keys 16 * k ...
template <typename T, int kCount>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[kCount / 2], const float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

// The same of the lane's row r alone.
template <typename T, int kCount>
__device__ __forceinline__ void pack_row(uint32_t (&p)[kCount / 2], const float (&s)[kCount],
                                         int r) {
#pragma unroll
  for (int i = r; i < kCount / 2; i += 2) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

}  // namespace trianglemix

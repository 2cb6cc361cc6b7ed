// Rows of float32 numbers in shared memory, for the kernels without tensor cores.
#pragma once

#include "softmax.cuh"

namespace trianglemix {

// Floats of a row in shared memory: an odd number of 16-byte pieces, against bank conflicts.
__host__ __device__ constexpr int pitch(int size) { return (size + 4) / 8 * 8 + 4; }

// Scaled (and capped) score of a query with a key, in base 2 exponents; of any plan's sizes.
template <typename Plan>
__device__ __forceinline__ float scaled_score(const Plan& plan, const float* q, const float* k) {
  float x = 0.0f;
  for (int c = 0; c < plan.head_size; c += 4) {
    const float4 a = *reinterpret_cast<const float4*>(q + c);
    const float4 b = *reinterpret_cast<const float4*>(k + c);
    x += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
  }
  x *= plan.scale;
  return (plan.softcap > 0.0f ? plan.softcap * tanhf(x / plan.softcap) : x) * kLog2E;
}

}  // namespace trianglemix

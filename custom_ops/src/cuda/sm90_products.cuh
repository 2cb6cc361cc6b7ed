// The score product of a warpgroup: 64 rows of queries with a tile of keys, both in shared memory.
#pragma once

#include "wgmma.cuh"

namespace trianglemix {

// Sets out for s[64, kN] = Q K^T. `query` is the warpgroup's first row, of a tile of kRows rows;
// `key` the first of kN keys. Slabs of kSwizzle bytes a row follow each other. Descriptors' low
// words are moved on by bytes / 16 from step to step.
template <typename T, int kD, int kSwizzle, int kRows, int kN>
__device__ __forceinline__ void issue_products(float (&s)[kN / 2], uint32_t query, uint32_t key) {
  constexpr int kSlabColumns = kSwizzle / 2;
  const uint32_t q = uniform(matrix_descriptor(query, 16));
  const uint32_t k = uniform(matrix_descriptor(key, 16));
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    const int slab = 16 * step / kSlabColumns, inside = 32 * step % kSwizzle;
    Wgmma<T, kSwizzle>::scores(s, q + (slab * kRows * kSwizzle + inside) / 16,
                               k + (slab * kN * kSwizzle + inside) / 16, step > 0);
  }
  wgmma_commit();
}

}  // namespace trianglemix

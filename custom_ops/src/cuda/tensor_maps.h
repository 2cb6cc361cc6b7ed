// Descriptions of tensors for Hopper's copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../problem.h"

namespace trianglemix {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's encoder, found at run time: the library must load where there is no driver.
inline Encode find_encoder() {
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

inline bool encode_map(CUtensorMap* map, bool half, int swizzle, const void* base,
                       const MapShape& shape) {
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  const auto type = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return find_encoder()(map, type, shape.rank, const_cast<void*>(base), shape.sizes, shape.strides,
                        shape.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Keys or values that lie by pages: boxes of `columns` numbers of at most `keys` slots of a page.
inline MapShape page_shape(const AttentionProblem& problem, const PageStrides& strides, int columns,
                           int keys) {
  const auto bytes = [](int64_t numbers) { return static_cast<cuuint64_t>(2 * numbers); };
  const auto u64 = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const KeyPages& pages = problem.pages;
  return {4,
          {u64(problem.head_size), u64(pages.size), u64(problem.kv_num_heads), u64(pages.count)},
          {bytes(strides.slot), bytes(strides.head), bytes(strides.page)},
          {static_cast<cuuint32_t>(columns),
           static_cast<cuuint32_t>(std::min<int64_t>(pages.size, keys)), 1, 1}};
}

}  // namespace trianglemix

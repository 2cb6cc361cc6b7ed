// Descriptions of tensors for Hopper's copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

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

}  // namespace trianglemix

// Opens the CUDA kernels' library, which lies beside this one.
#pragma once

#include "../cuda/cuda_library.h"

namespace trianglemix {

// True when the library's file is there; it is not opened.
bool HasCudaLibrary();

// The kernels of the operator whose symbol is `entry` and whose problem has that many bytes. Opens
// the library on the first call. Throws ort::Error with the reason, each time it is asked for.
const CudaKernels& LoadCudaKernels(const char* entry, size_t problem_bytes);

}  // namespace trianglemix

// Opens the CUDA kernels' library, which lies beside this one.
#pragma once

#include "cuda/cuda_library.h"

namespace trianglemix {

// True when the library's file is there; it is not opened.
bool HasCudaLibrary();

// Opens it on the first call. Throws ort::Error with the reason, each time it is asked for.
const CudaLibrary& LoadCudaLibrary();

}  // namespace trianglemix

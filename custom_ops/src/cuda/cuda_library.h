// The C interface between the registration library and the CUDA kernels' own shared library,
// which is opened (dlopen) only when a CUDA session creates a kernel.
#pragma once

#include "../problem.h"

#define TRIANGLEMIX_CUDA_ABI 2
#define TRIANGLEMIX_CUDA_ENTRY "trianglemix_cuda_library"

namespace trianglemix {

struct CudaLibrary {
  int32_t abi;           // TRIANGLEMIX_CUDA_ABI
  size_t problem_bytes;  // sizeof(TriangleProblem) as the library was compiled

  // Bytes of device scratch that run() needs; from sizes only, so that a captured graph stays
  // right.
  size_t (*workspace_bytes)(const TriangleProblem* problem);

  // Enqueues everything (append to the cache, attention) on `stream` (a cudaStream_t).
  // Null on success, else a text that lives for ever.
  const char* (*run)(const TriangleProblem* problem, void* workspace, void* stream);
};

}  // namespace trianglemix

// extern "C" const trianglemix::CudaLibrary* trianglemix_cuda_library();

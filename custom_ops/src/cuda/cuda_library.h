// The C interface between the registration library and the CUDA kernels' own shared library,
// which is opened (dlopen) only when a CUDA session creates a kernel; and between PyTorch and that
// library, through the structures of custom_ops/cuda_library.py.
#pragma once

#include "../problem.h"

#define TRIANGLEMIX_CUDA_ABI 4

namespace trianglemix {

// What the library has for one operator. Each operator has a symbol of its own, a function that
// begins with trianglemix_cuda_ and returns this:
//   extern "C" const trianglemix::CudaKernels* trianglemix_cuda_library();  // TriangleAttention
//   extern "C" const trianglemix::CudaKernels* trianglemix_cuda_block_sparse();
struct CudaKernels {
  int32_t abi;           // TRIANGLEMIX_CUDA_ABI
  size_t problem_bytes;  // of its AttentionProblem, or what extends it, as the library was compiled

  // Bytes of device scratch that run() needs; from sizes only, so that a captured graph stays
  // right.
  size_t (*workspace_bytes)(const AttentionProblem* problem);

  // Enqueues everything (append to the cache where there is something to, attention) on `stream`
  // (a cudaStream_t).
  // Null on success, else a text that lives for ever.
  const char* (*run)(const AttentionProblem* problem, void* workspace, void* stream);
};

}  // namespace trianglemix

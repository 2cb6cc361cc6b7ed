#include "cuda_loader.h"

#include <dlfcn.h>
#include <unistd.h>

#include <string>

#include "../ort_abi.h"

namespace trianglemix {
namespace {

constexpr const char* kFileName = "libtrianglemix_cuda.so";

// Path of the CUDA library in the folder of the library that holds this function.
std::string Path() {
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&HasCudaLibrary), &self) == 0 ||
      self.dli_fname == nullptr)
    return kFileName;
  const std::string path = self.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + kFileName;  // without a slash: npos + 1 is 0
}

[[noreturn]] void RefuseCuda(const std::string& reason) {
  throw ort::Error(ort::ErrorCode::kNotImplemented,
                   "the CUDA kernels cannot be used: " + reason +
                       "; install the wheel that was built with CUDA, or run on the CPU provider");
}

}  // namespace

bool HasCudaLibrary() { return access(Path().c_str(), R_OK) == 0; }

const CudaKernels& LoadCudaKernels(const char* entry, size_t problem_bytes) {
  const std::string path = Path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // the same one each time
  if (handle == nullptr) RefuseCuda(dlerror());
  using Entry = const CudaKernels* (*)();
  const auto function = reinterpret_cast<Entry>(dlsym(handle, entry));
  if (function == nullptr) RefuseCuda(path + " has no entry " + entry);
  const CudaKernels& kernels = *function();
  if (kernels.abi != TRIANGLEMIX_CUDA_ABI || kernels.problem_bytes != problem_bytes)
    RefuseCuda(path + " has interface version " + std::to_string(kernels.abi) + ", but this is " +
               std::to_string(TRIANGLEMIX_CUDA_ABI));
  return kernels;
}

}  // namespace trianglemix

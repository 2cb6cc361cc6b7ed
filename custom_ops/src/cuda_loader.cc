#include "cuda_loader.h"

#include <dlfcn.h>
#include <unistd.h>

#include <mutex>
#include <string>

#include "ort_abi.h"

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
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? kFileName : path.substr(0, slash + 1) + kFileName;
}

// Null with a reason where it cannot be used.
const CudaLibrary* Open(const std::string& path, std::string* reason) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    *reason = dlerror();
    return nullptr;
  }
  using Entry = const CudaLibrary* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, TRIANGLEMIX_CUDA_ENTRY));
  if (entry == nullptr) {
    *reason = path + " has no entry " TRIANGLEMIX_CUDA_ENTRY;
    return nullptr;
  }
  const CudaLibrary* library = entry();
  if (library->abi == TRIANGLEMIX_CUDA_ABI && library->problem_bytes == sizeof(TriangleProblem))
    return library;
  *reason = path + " has interface version " + std::to_string(library->abi) + ", but this is " +
            std::to_string(TRIANGLEMIX_CUDA_ABI);
  return nullptr;
}

}  // namespace

bool HasCudaLibrary() { return access(Path().c_str(), R_OK) == 0; }

const CudaLibrary& LoadCudaLibrary() {
  static std::mutex mutex;
  static const CudaLibrary* library = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  std::string reason;
  if (library == nullptr) library = Open(Path(), &reason);
  if (library == nullptr)
    throw ort::Error(
        ort::ErrorCode::kNotImplemented,
        "TriangleAttention: the CUDA kernels cannot be used: " + reason +
            "; install the wheel that was built with CUDA, or run on the CPU provider");
  return *library;
}

}  // namespace trianglemix

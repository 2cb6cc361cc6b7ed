// The part of ONNX Runtime's C ABI that this library uses, declared by ourselves.
//
// No package carries the official header, and none is needed: `OrtApiBase` is two pointers for
// ever, and a slot of the table that `GetApi` returns never moves once released. Asking for the
// lowest version that has every slot makes one binary run on that and every later ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

extern "C" {
struct OrtApi;
struct OrtStatus;
struct OrtSessionOptions;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtCustomOpDomain;
struct OrtShapeInferContext;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtOpAttr;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
}

namespace trianglemix::ort {

// 17 brought ParallelFor and shape inference to custom operators, 18 the may-inplace map.
constexpr uint32_t kApiVersion = 18;

enum class ElementType : int {
  kUndefined = 0,
  kFloat32 = 1,
  kUint8 = 2,
  kInt32 = 6,
  kFloat16 = 10,
  kBFloat16 = 16
};
enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum class Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum class MemoryType : int { kCpuInput = -2, kCpuOutput = -1, kDefault = 0 };
enum class AttributeType : int { kInt = 1, kFloat = 3 };

// OrtCustomOp of version 18.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(void*) == 8 && sizeof(CustomOp) == 26 * sizeof(void*), "the ABI is 64-bit");

// name, slot, return type, arguments
#define TRIANGLEMIX_ORT_SLOTS(X)                                                                 \
  X(CreateStatus, 0, OrtStatus*, (ErrorCode, const char*))                                       \
  X(GetErrorMessage, 2, const char*, (const OrtStatus*))                                         \
  X(CreateCustomOpDomain, 26, OrtStatus*, (const char*, OrtCustomOpDomain**))                    \
  X(CustomOpDomain_Add, 27, OrtStatus*, (OrtCustomOpDomain*, const CustomOp*))                   \
  X(AddCustomOpDomain, 28, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))                 \
  X(GetTensorMutableData, 51, OrtStatus*, (OrtValue*, void**))                                   \
  X(CreateTensorTypeAndShapeInfo, 57, OrtStatus*, (OrtTensorTypeAndShapeInfo**))                 \
  X(SetTensorElementType, 58, OrtStatus*, (OrtTensorTypeAndShapeInfo*, ElementType))             \
  X(SetDimensions, 59, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const int64_t*, size_t))         \
  X(GetTensorElementType, 60, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, ElementType*))      \
  X(GetDimensionsCount, 61, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))             \
  X(GetDimensions, 62, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))         \
  X(GetSymbolicDimensions, 63, OrtStatus*,                                                       \
    (const OrtTensorTypeAndShapeInfo*, const char**, size_t))                                    \
  X(GetTensorTypeAndShape, 65, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))       \
  X(AllocatorAlloc, 75, OrtStatus*, (OrtAllocator*, size_t, void**))                             \
  X(AllocatorFree, 76, OrtStatus*, (OrtAllocator*, void*))                                       \
  X(KernelInfoGetAttribute_float, 85, OrtStatus*, (const OrtKernelInfo*, const char*, float*))   \
  X(KernelInfoGetAttribute_int64, 86, OrtStatus*, (const OrtKernelInfo*, const char*, int64_t*)) \
  X(KernelContext_GetInputCount, 88, OrtStatus*, (const OrtKernelContext*, size_t*))             \
  X(KernelContext_GetOutputCount, 89, OrtStatus*, (const OrtKernelContext*, size_t*))            \
  X(KernelContext_GetInput, 90, OrtStatus*, (const OrtKernelContext*, size_t, const OrtValue**)) \
  X(KernelContext_GetOutput, 91, OrtStatus*,                                                     \
    (OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**))                             \
  X(ReleaseStatus, 93, void, (OrtStatus*))                                                       \
  X(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo*))                       \
  X(ReleaseAllocator, 132, void, (OrtAllocator*))                                                \
  X(KernelContext_GetGPUComputeStream, 193, OrtStatus*, (const OrtKernelContext*, void**))       \
  X(GetTensorMemoryInfo, 194, OrtStatus*, (const OrtValue*, const OrtMemoryInfo**))              \
  X(KernelContext_GetAllocator, 253, OrtStatus*,                                                 \
    (const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**))                             \
  X(ShapeInferContext_GetInputTypeShape, 268, OrtStatus*,                                        \
    (const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**))                          \
  X(ShapeInferContext_GetAttribute, 269, OrtStatus*,                                             \
    (const OrtShapeInferContext*, const char*, const OrtOpAttr**))                               \
  X(ShapeInferContext_SetOutputTypeShape, 270, OrtStatus*,                                       \
    (const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*))                     \
  X(SetSymbolicDimensions, 271, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const char**, size_t))  \
  X(ReadOpAttr, 272, OrtStatus*, (const OrtOpAttr*, AttributeType, void*, size_t, size_t*))      \
  X(KernelContext_ParallelFor, 274, OrtStatus*,                                                  \
    (const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*))

// An error that becomes an ONNX Runtime status at the border.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

// One ONNX Runtime of the process: there may be two (a second copy inside onnxruntime-genai).
class Api {
 public:
  explicit Api(const OrtApi* table) : slots_(reinterpret_cast<void* const*>(table)) {}

#define TRIANGLEMIX_ORT_CALL(name, slot, result, arguments)           \
  template <typename... A>                                            \
  result name(A... a) const {                                         \
    return reinterpret_cast<result(*) arguments>(slots_[slot])(a...); \
  }
  TRIANGLEMIX_ORT_SLOTS(TRIANGLEMIX_ORT_CALL)
#undef TRIANGLEMIX_ORT_CALL

  // Throws ONNX Runtime's own message.
  void Check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = GetErrorMessage(status);
    ReleaseStatus(status);
    throw Error(ErrorCode::kFail, message);
  }

  // True on success; a failure is an answer here, not an error.
  bool Succeeded(OrtStatus* status) const {
    if (status == nullptr) return true;
    ReleaseStatus(status);
    return false;
  }

  // Runs `body` and turns what it throws into a status that begins with `name`, the operator's:
  // nothing may be thrown into ONNX Runtime.
  template <typename Body>
  OrtStatus* Guard(const char* name, Body&& body) const noexcept {
    try {
      body();
      return nullptr;
    } catch (const Error& error) {
      return Fail(name, error.code(), error.what());
    } catch (const std::bad_alloc&) {
      return Fail(name, ErrorCode::kFail, "out of memory");
    } catch (const std::exception& error) {
      return Fail(name, ErrorCode::kFail, error.what());
    }
  }

 private:
  OrtStatus* Fail(const char* name, ErrorCode code, const char* message) const {
    return CreateStatus(code, (std::string(name) + ": " + message).c_str());
  }

  void* const* slots_;
};

}  // namespace trianglemix::ort

// What ONNX Runtime is told of an operator. Each has a folder of its own, with a function that
// returns its entry; operators.inc lists those functions.
#pragma once

#include <memory>
#include <vector>

#include "ort_abi.h"
#include "problem.h"

namespace trianglemix {

enum class Device { kCpu, kCuda };

// Of the type that the kernel is made for: float32, float16 or bfloat16.
constexpr ort::ElementType kKernelType = ort::ElementType::kUndefined;

inline ort::ElementType ElementTypeOf(DType dtype) {
  if (dtype == DType::kFloat32) return ort::ElementType::kFloat32;
  return dtype == DType::kFloat16 ? ort::ElementType::kFloat16 : ort::ElementType::kBFloat16;
}

// An input or an output.
struct Port {
  const char* name;
  ort::ElementType type;
  bool required;
  bool on_host;  // an input that every device finds in host memory

  ort::ElementType TypeIn(DType dtype) const {
    return type == kKernelType ? ElementTypeOf(dtype) : type;
  }
};

// What kernels are made for: each is registered with ONNX Runtime.
struct KernelKind {
  ort::Api api;
  const char* operator_name;
  DType dtype;
  Device device;
};

// One node of a session.
struct Kernel {
  explicit Kernel(const KernelKind& kind) : kind(kind) {}
  virtual ~Kernel() = default;
  // Throws ort::Error for inputs that are not a call of the operator.
  virtual void Compute(OrtKernelContext* context) const = 0;

  const KernelKind kind;
};

struct Operator {
  const char* name;
  std::vector<Port> inputs;
  std::vector<Port> outputs;
  bool has_cuda;
  // Throws ort::Error for attributes out of range, or kernels that cannot be loaded.
  std::unique_ptr<Kernel> (*make_kernel)(const KernelKind& kind, const OrtKernelInfo* info);
  // Tells the graph what is known of the outputs' shapes. Throws ort::Error. May be null.
  void (*infer_shapes)(const ort::Api& api, OrtShapeInferContext* context);
  // Which inputs' buffers may be which outputs', and how many. ONNX Runtime asks without saying of
  // which operator. May be null.
  size_t (*may_inplace)(int** inputs, int** outputs);
};

#define TRIANGLEMIX_OPERATOR(name) Operator name();
#include "operators.inc"
#undef TRIANGLEMIX_OPERATOR

}  // namespace trianglemix

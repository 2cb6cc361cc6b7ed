// The operator as ONNX Runtime sees it: attributes, inputs and outputs become a TriangleProblem.
#pragma once

#include "ort_abi.h"
#include "problem.h"

namespace trianglemix {

enum class Device { kCpu, kCuda };
struct CudaLibrary;

// The order of contract.py.
enum Input : size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kSeqlensK,
  kTotalSequenceLength,
  kPromptLength,
  kFirstValid,
  kCosCache,
  kSinCache,
  kInputCount
};
enum Output : size_t { kOutput, kPresentKey, kPresentValue, kOutputCount };

struct Attributes {
  int64_t num_heads;
  int64_t kv_num_heads;
  float scale;
  float softcap;
  Pattern pattern;
  bool rotary_interleaved;
};

// Throws ort::Error for attributes that are missing, of another type or out of range.
Attributes ReadAttributes(const ort::Api& api, const OrtKernelInfo* info);

// One node of a session: its attributes, checked once.
class OpKernel {
 public:
  // Throws ort::Error for attributes out of range, or CUDA kernels that cannot be loaded.
  OpKernel(ort::Api api, const OrtKernelInfo* info, DType dtype, Device device);

  // Throws ort::Error for inputs that are not a call of this operator.
  void Compute(OrtKernelContext* context) const;

  const ort::Api& api() const { return api_; }

 private:
  ort::Api api_;
  DType dtype_;
  Device device_;
  Attributes attributes_;
  const CudaLibrary* cuda_ = nullptr;
};

// Tells the graph what is known of the outputs' shapes. Throws ort::Error.
void InferOutputShapes(const ort::Api& api, OrtShapeInferContext* context);

}  // namespace trianglemix

// One node of a session, and one call of it.
#include "op.h"

#include <algorithm>
#include <array>
#include <string>

#include "cpu/kernel.h"
#include "cuda_loader.h"
#include "op_inputs.h"

namespace trianglemix {
namespace {

using ort::Api;

constexpr std::array<const char*, kOutputCount> kOutputNames = {"output", "present_key",
                                                                "present_value"};

Tensor MakeOutput(const Api& api, OrtKernelContext* context, Output index, const Shape& shape) {
  OrtValue* value = nullptr;
  api.Check(api.KernelContext_GetOutput(context, index, shape.dims.data(), shape.rank, &value));
  if (value == nullptr)
    Refuse(std::string(kOutputNames[index]) + " is not an output of the node, but must be");
  return ReadTensor(api, value, kOutputNames[index]);
}

// One buffer for past and present works only when both have the same slots.
void CheckInPlace(const Tensor& past, const Tensor& present, const char* name) {
  if (past && !past.shape.empty() && past.data == present.data && past.shape != present.shape)
    Refuse(std::string("past_") + name + " and present_" + name +
           " are one buffer, but have shapes " + past.shape.text() + " and " +
           present.shape.text() + "; give a past of as many slots as total_sequence_length");
}

void SetOutputs(const Api& api, OrtKernelContext* context, const Inputs& inputs,
                TriangleProblem* p) {
  const Shape key_shape{p->batch, p->kv_num_heads, p->present_capacity, p->head_size};
  const Shape value_shape{p->batch, p->kv_num_heads, p->present_capacity, p->value_head_size};
  const Shape shape{p->batch, p->query_length, p->num_heads * p->value_head_size};
  p->output = MakeOutput(api, context, kOutput, shape).data;
  const Tensor key = MakeOutput(api, context, kPresentKey, key_shape);
  const Tensor value = MakeOutput(api, context, kPresentValue, value_shape);
  CheckInPlace(inputs[kPastKey], key, "key");
  CheckInPlace(inputs[kPastValue], value, "value");
  p->present_key = key.data;
  p->present_value = value.data;
}

class SessionThreads final : public cpu::ParallelFor {
 public:
  SessionThreads(const Api& api, const OrtKernelContext* context) : api_(api), context_(context) {}

  const char* Run(size_t count, Body body, void* argument) override {
    // As many batches as indices: idle threads take the next one.
    OrtStatus* status = api_.KernelContext_ParallelFor(context_, body, count, count, argument);
    return api_.Succeeded(status) ? nullptr : "ONNX Runtime's thread pool refused the work";
  }

 private:
  const Api& api_;
  const OrtKernelContext* context_;
};

// Device scratch from the execution provider's allocator, freed in stream order.
class DeviceBuffer {
 public:
  DeviceBuffer(const Api& api, const OrtKernelContext* context, const OrtValue* neighbour,
               size_t bytes)
      : api_(api) {
    if (bytes == 0) return;
    const OrtMemoryInfo* memory = nullptr;
    api.Check(api.GetTensorMemoryInfo(neighbour, &memory));
    api.Check(api.KernelContext_GetAllocator(context, memory, &allocator_));
    OrtStatus* status = api.AllocatorAlloc(allocator_, bytes, &data_);
    if (status != nullptr) {
      api.ReleaseAllocator(allocator_);
      api.Check(status);
    }
  }
  ~DeviceBuffer() {
    if (allocator_ == nullptr) return;
    api_.Succeeded(api_.AllocatorFree(allocator_, data_));
    api_.ReleaseAllocator(allocator_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() const { return data_; }

 private:
  const Api& api_;
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

void RunOnCuda(const Api& api, const OrtKernelContext* context, const CudaLibrary& library,
               const TriangleProblem& problem, const OrtValue* query) {
  void* stream = nullptr;
  api.Check(api.KernelContext_GetGPUComputeStream(context, &stream));
  const DeviceBuffer workspace(api, context, query, library.workspace_bytes(&problem));
  if (const char* message = library.run(&problem, workspace.data(), stream))
    throw ort::Error(ort::ErrorCode::kFail, std::string("TriangleAttention on CUDA: ") + message);
}

}  // namespace

OpKernel::OpKernel(Api api, const OrtKernelInfo* info, DType dtype, Device device)
    : api_(api), dtype_(dtype), device_(device), attributes_(ReadAttributes(api, info)) {
  if (device_ == Device::kCuda) cuda_ = &LoadCudaLibrary();
}

void OpKernel::Compute(OrtKernelContext* context) const {
  const Inputs inputs = ReadInputs(api_, context);
  TriangleProblem problem = MakeProblem(attributes_, dtype_, inputs);
  if (device_ == Device::kCpu) CheckLengths(problem);
  SetOutputs(api_, context, inputs, &problem);
  if (device_ == Device::kCuda) {
    RunOnCuda(api_, context, *cuda_, problem, inputs[kQuery].value);
    return;
  }
  SessionThreads threads(api_, context);
  if (const char* message = cpu::Run(problem, threads))
    throw ort::Error(ort::ErrorCode::kFail, std::string("TriangleAttention: ") + message);
}

}  // namespace trianglemix

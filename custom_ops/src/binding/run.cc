#include "run.h"

#include <string>

namespace trianglemix {

using ort::Api;

namespace {

// One buffer for past and present works only when both have the same slots.
void CheckInPlace(const Tensor& past, const Tensor& present, const char* name) {
  if (past && !past.shape.empty() && past.data == present.data && past.shape != present.shape)
    Refuse(std::string("past_") + name + " and present_" + name +
           " are one buffer, but have shapes " + past.shape.text() + " and " +
           present.shape.text() + "; give a past of as many slots as total_sequence_length");
}

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

}  // namespace

Tensor MakeOutput(const Api& api, OrtKernelContext* context, size_t index, const char* name,
                  const Shape& shape) {
  const Tensor output = MakeOptionalOutput(api, context, index, name, shape);
  if (!output) Refuse(std::string(name) + " is not an output of the node, but must be");
  return output;
}

Tensor MakeOptionalOutput(const Api& api, OrtKernelContext* context, size_t index, const char* name,
                          const Shape& shape) {
  size_t count = 0;
  api.Check(api.KernelContext_GetOutputCount(context, &count));
  OrtValue* value = nullptr;
  if (index < count)
    api.Check(api.KernelContext_GetOutput(context, index, shape.dims.data(), shape.rank, &value));
  return ReadTensor(api, value, name);
}

void SetOutputs(const Api& api, OrtKernelContext* context, const Inputs& inputs,
                AttentionProblem* p) {
  const Shape key_shape{p->batch, p->kv_num_heads, p->present_capacity, p->head_size};
  const Shape value_shape{p->batch, p->kv_num_heads, p->present_capacity, p->value_head_size};
  const Shape shape{p->batch, p->query_length, p->num_heads * p->value_head_size};
  const auto make = [&](Output index, const Shape& dims) {
    return MakeOutput(api, context, index, kOutputs[index].name, dims);
  };
  p->output = make(kOutput, shape).data;
  const Tensor key = make(kPresentKey, key_shape);
  const Tensor value = make(kPresentValue, value_shape);
  CheckInPlace(inputs[kPastKey], key, "key");
  CheckInPlace(inputs[kPastValue], value, "value");
  p->present_key = key.data;
  p->present_value = value.data;
}

void RunOnCuda(const Api& api, const OrtKernelContext* context, const CudaKernels& kernels,
               const AttentionProblem& problem, const OrtValue* query) {
  void* stream = nullptr;
  api.Check(api.KernelContext_GetGPUComputeStream(context, &stream));
  const DeviceBuffer workspace(api, context, query, kernels.workspace_bytes(&problem));
  if (const char* message = kernels.run(&problem, workspace.data(), stream))
    throw ort::Error(ort::ErrorCode::kFail, std::string("the CUDA kernels say: ") + message);
}

}  // namespace trianglemix

#include "op.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "cpu/kernel.h"
#include "cuda/cuda_library.h"
#include "cuda_loader.h"

namespace trianglemix {
namespace {

using ort::Api;
using ort::ElementType;
using ort::Error;
using ort::ErrorCode;

constexpr int64_t kMaxRank = 4;
// Positions are below 2^31, so a larger sink, window or last means the same and cannot overflow.
constexpr int64_t kUnbounded = int64_t{1} << 32;
constexpr Pattern kDefaultPattern = {8, 512, 128};

constexpr std::array<const char*, kInputCount> kInputNames = {"query",
                                                              "key",
                                                              "value",
                                                              "past_key",
                                                              "past_value",
                                                              "seqlens_k",
                                                              "total_sequence_length",
                                                              "prompt_length",
                                                              "first_valid"};
constexpr std::array<const char*, kOutputCount> kOutputNames = {"output", "present_key",
                                                                "present_value"};

[[noreturn]] void Refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, "TriangleAttention: " + message);
}

std::string Text(int64_t value) { return std::to_string(value); }

// ------------------------------------------------------------------------------ attributes

// True when the node has the attribute. One of another type is refused.
bool ReadInt(const Api& api, const OrtKernelInfo* info, const char* name, int64_t* value) {
  if (api.Succeeded(api.KernelInfoGetAttribute_int64(info, name, value))) return true;
  float other;
  if (api.Succeeded(api.KernelInfoGetAttribute_float(info, name, &other)))
    Refuse(std::string(name) + " is a float attribute, but must be an integer");
  return false;
}

bool ReadFloat(const Api& api, const OrtKernelInfo* info, const char* name, float* value) {
  if (api.Succeeded(api.KernelInfoGetAttribute_float(info, name, value))) return true;
  int64_t other;
  if (api.Succeeded(api.KernelInfoGetAttribute_int64(info, name, &other)))
    Refuse(std::string(name) + " is an integer attribute, but must be a float");
  return false;
}

void CheckHeads(const Attributes& a) {
  if (a.num_heads < 1 || a.kv_num_heads < 1 || a.num_heads % a.kv_num_heads != 0)
    Refuse("num_heads is " + Text(a.num_heads) + " and kv_num_heads is " + Text(a.kv_num_heads) +
           ", but num_heads must be a positive multiple of kv_num_heads");
}

void CheckNumbers(const Attributes& a) {
  if (!std::isfinite(a.scale))
    Refuse("scale is " + std::to_string(a.scale) + ", but must be finite (0 means 1/sqrt(D))");
  if (!std::isfinite(a.softcap) || a.softcap < 0)
    Refuse("softcap is " + std::to_string(a.softcap) + ", but must be 0 (off) or more");
  if (a.pattern.sink < 0)
    Refuse("num_sink_tokens is " + Text(a.pattern.sink) + ", but must be 0 or more");
  if (a.pattern.window < 1 && a.pattern.window != kDenseWindow)
    Refuse("sliding_window_size is " + Text(a.pattern.window) +
           ", but must be 1 or more, or -1 to keep every key");
  if (a.pattern.last < 1)
    Refuse("num_last_tokens is " + Text(a.pattern.last) + ", but must be 1 or more");
}

Attributes ReadAttributes(const Api& api, const OrtKernelInfo* info) {
  Attributes a{0, 0, 0.0f, 0.0f, kDefaultPattern};
  if (!ReadInt(api, info, "num_heads", &a.num_heads))
    Refuse("attribute num_heads is missing; give the number of query heads");
  if (!ReadInt(api, info, "kv_num_heads", &a.kv_num_heads))
    Refuse("attribute kv_num_heads is missing; give the number of key/value heads");
  ReadFloat(api, info, "scale", &a.scale);
  ReadFloat(api, info, "softcap", &a.softcap);
  ReadInt(api, info, "num_sink_tokens", &a.pattern.sink);
  ReadInt(api, info, "sliding_window_size", &a.pattern.window);
  ReadInt(api, info, "num_last_tokens", &a.pattern.last);
  CheckHeads(a);
  CheckNumbers(a);
  for (int64_t* bound : {&a.pattern.sink, &a.pattern.window, &a.pattern.last})
    *bound = std::min(*bound, kUnbounded);
  return a;
}

// ---------------------------------------------------------------------------------- tensors

struct Shape {
  size_t rank = 0;
  std::array<int64_t, kMaxRank> dims{};

  Shape() = default;
  Shape(std::initializer_list<int64_t> values) : rank(values.size()) {
    std::copy(values.begin(), values.end(), dims.begin());
  }
  bool operator==(const Shape& other) const { return rank == other.rank && dims == other.dims; }
  bool operator!=(const Shape& other) const { return !(*this == other); }
  bool empty() const {
    return std::find(dims.begin(), dims.begin() + rank, 0) != dims.begin() + rank;
  }
  std::string text() const {
    std::string text = "[";
    for (size_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + Text(dims[i]);
    return text + "]";
  }
};

struct Tensor {
  const OrtValue* value = nullptr;
  void* data = nullptr;
  ElementType type = ElementType::kUndefined;
  Shape shape;

  explicit operator bool() const { return value != nullptr; }
};

const char* TypeName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "float32";
    case ElementType::kFloat16:
      return "float16";
    case ElementType::kBFloat16:
      return "bfloat16";
    case ElementType::kInt32:
      return "int32";
    default:
      return "another type";
  }
}

ElementType TypeOf(DType dtype) {
  if (dtype == DType::kFloat32) return ElementType::kFloat32;
  return dtype == DType::kFloat16 ? ElementType::kFloat16 : ElementType::kBFloat16;
}

class TypeAndShape {
 public:
  TypeAndShape(const Api& api, OrtTensorTypeAndShapeInfo* info) : api_(api), info_(info) {}
  ~TypeAndShape() { api_.ReleaseTensorTypeAndShapeInfo(info_); }
  TypeAndShape(const TypeAndShape&) = delete;
  TypeAndShape& operator=(const TypeAndShape&) = delete;
  OrtTensorTypeAndShapeInfo* get() const { return info_; }

 private:
  const Api& api_;
  OrtTensorTypeAndShapeInfo* info_;
};

Tensor ReadTensor(const Api& api, const OrtValue* value, const char* name) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  tensor.value = value;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  api.Check(api.GetTensorTypeAndShape(value, &raw));
  const TypeAndShape info(api, raw);
  int type = 0;
  api.Check(api.GetTensorElementType(info.get(), &type));
  tensor.type = static_cast<ElementType>(type);
  api.Check(api.GetDimensionsCount(info.get(), &tensor.shape.rank));
  if (tensor.shape.rank > kMaxRank)
    Refuse(std::string(name) + " has " + Text(static_cast<int64_t>(tensor.shape.rank)) +
           " dimensions, but no input has more than 4");
  api.Check(api.GetDimensions(info.get(), tensor.shape.dims.data(), tensor.shape.rank));
  api.Check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

using Inputs = std::array<Tensor, kInputCount>;

Inputs ReadInputs(const Api& api, const OrtKernelContext* context) {
  Inputs inputs;
  size_t count = 0;
  api.Check(api.KernelContext_GetInputCount(context, &count));
  for (size_t i = 0; i < std::min<size_t>(count, kInputCount); ++i) {
    const OrtValue* value = nullptr;
    api.Check(api.KernelContext_GetInput(context, i, &value));
    inputs[i] = ReadTensor(api, value, kInputNames[i]);
  }
  return inputs;
}

// ----------------------------------------------------------------------------------- checks

void CheckType(const Inputs& inputs, Input index, ElementType type) {
  const Tensor& tensor = inputs[index];
  if (tensor && tensor.type != type)
    Refuse(std::string(kInputNames[index]) + " is " + TypeName(tensor.type) + ", but must be " +
           TypeName(type));
}

void CheckShape(const Inputs& inputs, Input index, const Shape& expected, const char* meaning) {
  const Tensor& tensor = inputs[index];
  if (tensor && tensor.shape != expected)
    Refuse(std::string(kInputNames[index]) + " has shape " + tensor.shape.text() +
           ", but must be " + meaning + " = " + expected.text());
}

void CheckTypes(const Inputs& inputs, DType dtype) {
  for (Input required : {kQuery, kKey, kValue, kSeqlensK, kTotalSequenceLength})
    if (!inputs[required]) Refuse(std::string(kInputNames[required]) + " is missing");
  for (Input index : {kQuery, kKey, kValue, kPastKey, kPastValue})
    CheckType(inputs, index, TypeOf(dtype));
  for (Input index : {kSeqlensK, kTotalSequenceLength, kPromptLength, kFirstValid})
    CheckType(inputs, index, ElementType::kInt32);
}

int64_t HeadSize(const Tensor& tensor, const char* name, int64_t heads) {
  const int64_t width = tensor.shape.dims[2];
  if (width % heads != 0)
    Refuse(std::string(name) + " has shape " + tensor.shape.text() +
           ", whose last dimension is no multiple of its " + Text(heads) + " heads");
  const int64_t size = width / heads;
  if (size < kHeadSizeStep || size > kMaxHeadSize || size % kHeadSizeStep != 0)
    Refuse("the head size of " + std::string(name) + " is " + Text(size) +
           ", but must be a multiple of 8 from 8 to 256");
  return size;
}

void SetNewTokens(const Inputs& inputs, TriangleProblem* p) {
  for (Input index : {kQuery, kKey, kValue})
    if (inputs[index].shape.rank != 3)
      Refuse(std::string(kInputNames[index]) + " has shape " + inputs[index].shape.text() +
             ", but must have three dimensions [B, S, heads * head size]");
  p->batch = inputs[kQuery].shape.dims[0];
  p->query_length = inputs[kQuery].shape.dims[1];
  p->head_size = HeadSize(inputs[kQuery], "query", p->num_heads);
  p->value_head_size = HeadSize(inputs[kValue], "value", p->kv_num_heads);
  CheckShape(inputs, kKey, {p->batch, p->query_length, p->kv_num_heads * p->head_size},
             "[B, S, kv_num_heads * D]");
  CheckShape(inputs, kValue, {p->batch, p->query_length, p->kv_num_heads * p->value_head_size},
             "[B, S, kv_num_heads * Dv]");
  for (Input index : {kSeqlensK, kPromptLength, kFirstValid})
    CheckShape(inputs, index, {p->batch}, "[B]");
}

void SetPast(const Inputs& inputs, TriangleProblem* p) {
  if (bool(inputs[kPastKey]) != bool(inputs[kPastValue]))
    Refuse("past_key and past_value go together, but only one of them is given");
  if (!inputs[kPastKey]) return;
  for (Input index : {kPastKey, kPastValue})
    if (inputs[index].shape.rank != 4)
      Refuse(std::string(kInputNames[index]) + " has shape " + inputs[index].shape.text() +
             ", but must have four dimensions [B, kv_num_heads, P, head size]");
  p->past_capacity = inputs[kPastKey].shape.dims[2];
  CheckShape(inputs, kPastKey, {p->batch, p->kv_num_heads, p->past_capacity, p->head_size},
             "[B, kv_num_heads, P, D]");
  CheckShape(inputs, kPastValue, {p->batch, p->kv_num_heads, p->past_capacity, p->value_head_size},
             "[B, kv_num_heads, P, Dv] with past_key's P");
}

// total_sequence_length lies in host memory on every device.
void SetTotal(const Inputs& inputs, TriangleProblem* p) {
  const Tensor& tensor = inputs[kTotalSequenceLength];
  if (tensor.shape != Shape{} && tensor.shape != Shape{1})
    Refuse("total_sequence_length has shape " + tensor.shape.text() +
           ", but must be a scalar or [1]");
  p->total = *static_cast<const int32_t*>(tensor.data);
  const int64_t most = p->past_capacity + p->query_length;
  if (p->total < 0 || p->total > most)
    Refuse("total_sequence_length is " + Text(p->total) + ", but must be from 0 to " + Text(most) +
           ", the past's " + Text(p->past_capacity) + " slots and the " + Text(p->query_length) +
           " new tokens");
  p->present_capacity = std::max(p->past_capacity, p->total);
}

std::string Row(const char* name, int64_t b, int64_t value) {
  return std::string(name) + "[" + Text(b) + "] is " + Text(value);
}

void CheckLengths(const TriangleProblem& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = int64_t{p.seqlens_k[b]} + 1;
    const int64_t most = std::min(p.total, p.past_capacity + p.query_length);
    if (end < 0 || end > most)
      Refuse(Row("seqlens_k", b, end - 1) + ", but must be from -1 to " + Text(most - 1) +
             ": the row's keys end at seqlens_k + 1, at most at total_sequence_length " +
             Text(p.total));
    if (p.prompt_length != nullptr && p.prompt_length[b] < 0)
      Refuse(Row("prompt_length", b, p.prompt_length[b]) + ", but must be 0 or more");
    if (p.first_valid != nullptr && (p.first_valid[b] < 0 || p.first_valid[b] > end))
      Refuse(Row("first_valid", b, p.first_valid[b]) + ", but must be from 0 to " + Text(end) +
             ", the end of the row's keys");
  }
}

// ---------------------------------------------------------------------------------- outputs

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

TriangleProblem MakeProblem(const Attributes& attributes, DType dtype, const Inputs& inputs) {
  TriangleProblem p{};
  p.dtype = dtype;
  p.pattern = attributes.pattern;
  p.softcap = attributes.softcap;
  p.num_heads = attributes.num_heads;
  p.kv_num_heads = attributes.kv_num_heads;
  CheckTypes(inputs, dtype);
  SetNewTokens(inputs, &p);
  SetPast(inputs, &p);
  SetTotal(inputs, &p);
  p.scale = attributes.scale != 0.0f ? attributes.scale
                                     : 1.0f / std::sqrt(static_cast<float>(p.head_size));
  p.query = inputs[kQuery].data;
  p.key = inputs[kKey].data;
  p.value = inputs[kValue].data;
  p.past_key = p.past_capacity > 0 ? inputs[kPastKey].data : nullptr;
  p.past_value = p.past_capacity > 0 ? inputs[kPastValue].data : nullptr;
  p.seqlens_k = static_cast<const int32_t*>(inputs[kSeqlensK].data);
  p.prompt_length = static_cast<const int32_t*>(inputs[kPromptLength].data);
  p.first_valid = static_cast<const int32_t*>(inputs[kFirstValid].data);
  return p;
}

// -------------------------------------------------------------------------------- execution

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
    throw Error(ErrorCode::kFail, std::string("TriangleAttention on CUDA: ") + message);
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
    throw Error(ErrorCode::kFail, std::string("TriangleAttention: ") + message);
}

// -------------------------------------------------------------------------- shape inference

namespace {

int64_t InferAttribute(const Api& api, const OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  api.Check(api.ShapeInferContext_GetAttribute(context, name, &attribute));
  api.Check(api.ReadOpAttr(attribute, static_cast<int>(ort::AttributeType::kInt), &value,
                           sizeof(value), &bytes));
  return value;
}

}  // namespace

// Only the first output: the slots of the present depend on the value of total_sequence_length.
void InferOutputShapes(const Api& api, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* query = nullptr;
  OrtTensorTypeAndShapeInfo* value = nullptr;  // both belong to the context
  api.Check(api.ShapeInferContext_GetInputTypeShape(context, kQuery, &query));
  api.Check(api.ShapeInferContext_GetInputTypeShape(context, kValue, &value));
  size_t query_rank = 0, value_rank = 0;
  api.Check(api.GetDimensionsCount(query, &query_rank));
  api.Check(api.GetDimensionsCount(value, &value_rank));
  if (query_rank != 3 || value_rank != 3) return;
  std::array<int64_t, 3> dims{}, value_dims{};
  std::array<const char*, 3> names{};
  api.Check(api.GetDimensions(query, dims.data(), 3));
  api.Check(api.GetDimensions(value, value_dims.data(), 3));
  api.Check(api.GetSymbolicDimensions(query, names.data(), 3));
  const int64_t kv_heads = InferAttribute(api, context, "kv_num_heads");
  const bool known = value_dims[2] > 0 && kv_heads > 0;
  // ONNX Runtime has no word for an unknown dimension without a name.
  for (int i = 0; i < 2; ++i)
    if (dims[i] < 0 && names[i][0] == '\0') return;
  if (!known) return;
  dims[2] = value_dims[2] / kv_heads * InferAttribute(api, context, "num_heads");
  names[2] = "";
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  api.Check(api.CreateTensorTypeAndShapeInfo(&raw));
  const TypeAndShape output(api, raw);
  int type = 0;
  api.Check(api.GetTensorElementType(query, &type));
  api.Check(api.SetTensorElementType(raw, type));
  api.Check(api.SetDimensions(raw, dims.data(), 3));
  api.Check(api.SetSymbolicDimensions(raw, names.data(), 3));
  api.Check(api.ShapeInferContext_SetOutputTypeShape(context, kOutput, raw));
}

}  // namespace trianglemix

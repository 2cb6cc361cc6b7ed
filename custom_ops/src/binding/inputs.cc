#include "inputs.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace trianglemix {

using ort::Api;
using ort::ElementType;

void Refuse(const std::string& message) {
  throw ort::Error(ort::ErrorCode::kInvalidArgument, message);
}

std::string Text(int64_t value) { return std::to_string(value); }

namespace {

constexpr std::pair<ElementType, const char*> kTypeNames[] = {{ElementType::kFloat32, "float32"},
                                                              {ElementType::kFloat16, "float16"},
                                                              {ElementType::kBFloat16, "bfloat16"},
                                                              {ElementType::kInt32, "int32"},
                                                              {ElementType::kUint8, "uint8"}};

const char* TypeName(ElementType type) {
  for (const auto& [known, name] : kTypeNames)
    if (known == type) return name;
  return "another type";
}

}  // namespace

// ------------------------------------------------------------------------------------ reading

Tensor ReadTensor(const Api& api, const OrtValue* value, const char* name) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  tensor.value = value;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  api.Check(api.GetTensorTypeAndShape(value, &raw));
  const TypeAndShape info(api, raw);
  api.Check(api.GetTensorElementType(info.get(), &tensor.type));
  api.Check(api.GetDimensionsCount(info.get(), &tensor.shape.rank));
  if (tensor.shape.rank > kMaxRank)
    Refuse(std::string(name) + " has " + Text(static_cast<int64_t>(tensor.shape.rank)) +
           " dimensions, but no input has more than 4");
  api.Check(api.GetDimensions(info.get(), tensor.shape.dims.data(), tensor.shape.rank));
  api.Check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

Inputs ReadInputs(const Api& api, const OrtKernelContext* context) {
  Inputs inputs;
  size_t count = 0;
  api.Check(api.KernelContext_GetInputCount(context, &count));
  for (size_t i = 0; i < std::min<size_t>(count, kInputCount); ++i) {
    const OrtValue* value = nullptr;
    api.Check(api.KernelContext_GetInput(context, i, &value));
    inputs[i] = ReadTensor(api, value, kInputs[i].name);
  }
  return inputs;
}

// ----------------------------------------------------------------------------------- checks

namespace {

void CheckShape(const Inputs& inputs, Input index, const Shape& expected, const char* meaning) {
  const Tensor& tensor = inputs[index];
  if (tensor && tensor.shape != expected)
    Refuse(std::string(kInputs[index].name) + " has shape " + tensor.shape.text() +
           ", but must be " + meaning + " = " + expected.text());
}

void CheckTypes(const Inputs& inputs, DType dtype) {
  for (size_t i = 0; i < kInputCount; ++i)
    if (kInputs[i].required && !inputs[i]) Refuse(std::string(kInputs[i].name) + " is missing");
  if (bool(inputs[kKey]) != bool(inputs[kValue]))
    Refuse("key and value go together, but only one of them is given");
  for (size_t i = 0; i < kInputCount; ++i) {
    const ElementType type = kInputs[i].TypeIn(dtype);
    if (inputs[i] && inputs[i].type != type)
      Refuse(std::string(kInputs[i].name) + " is " + TypeName(inputs[i].type) + ", but must be " +
             TypeName(type));
  }
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

// Queries, keys and values side by side in each token of one tensor.
void SetPackedTokens(const Tensor& packed, AttentionProblem* p) {
  p->head_size = HeadSize(packed, "packed query", p->num_heads + 2 * p->kv_num_heads);
  p->value_head_size = p->head_size;
  p->query_stride = p->key_stride = p->value_stride = packed.shape.dims[2];
  const int64_t element = BytesOf(p->dtype);
  const char* data = static_cast<const char*>(packed.data);
  p->query = data;
  p->key = data + p->num_heads * p->head_size * element;
  p->value = data + (p->num_heads + p->kv_num_heads) * p->head_size * element;
}

void SetNewTokens(const Inputs& inputs, AttentionProblem* p) {
  for (Input index : {kQuery, kKey, kValue})
    if (inputs[index] && inputs[index].shape.rank != 3)
      Refuse(std::string(kInputs[index].name) + " has shape " + inputs[index].shape.text() +
             ", but must have three dimensions [B, S, heads * head size]");
  p->batch = inputs[kQuery].shape.dims[0];
  p->query_length = inputs[kQuery].shape.dims[1];
  for (Input index : {kSeqlensK, kPromptLength, kFirstValid})
    CheckShape(inputs, index, {p->batch}, "[B]");
  if (!inputs[kKey]) return SetPackedTokens(inputs[kQuery], p);
  p->head_size = HeadSize(inputs[kQuery], "query", p->num_heads);
  p->value_head_size = HeadSize(inputs[kValue], "value", p->kv_num_heads);
  CheckShape(inputs, kKey, {p->batch, p->query_length, p->kv_num_heads * p->head_size},
             "[B, S, kv_num_heads * D]");
  CheckShape(inputs, kValue, {p->batch, p->query_length, p->kv_num_heads * p->value_head_size},
             "[B, S, kv_num_heads * Dv]");
  p->query = inputs[kQuery].data;
  p->key = inputs[kKey].data;
  p->value = inputs[kValue].data;
  p->query_stride = p->num_heads * p->head_size;
  p->key_stride = p->kv_num_heads * p->head_size;
  p->value_stride = p->kv_num_heads * p->value_head_size;
}

void SetRotation(const Inputs& inputs, bool interleaved, AttentionProblem* p) {
  if (bool(inputs[kCosCache]) != bool(inputs[kSinCache]))
    Refuse("cos_cache and sin_cache go together, but only one of them is given");
  if (!inputs[kCosCache]) return;
  const Shape& shape = inputs[kCosCache].shape;
  if (shape.rank != 2 || 2 * shape.dims[1] > p->head_size || shape.empty())
    Refuse("cos_cache has shape " + shape.text() +
           ", but must be [positions, half of what is turned of a head], of heads of " +
           Text(p->head_size));
  CheckShape(inputs, kSinCache, shape, "cos_cache's");
  if (p->head_size != p->value_head_size)
    Refuse("a node that rotates needs keys and values of one size, but they have " +
           Text(p->head_size) + " and " + Text(p->value_head_size));
  if (p->total > shape.dims[0])
    Refuse("total_sequence_length is " + Text(p->total) + ", but cos_cache has only " +
           Text(shape.dims[0]) + " positions: the model is not made for longer prompts");
  p->rotation = {inputs[kCosCache].data, inputs[kSinCache].data, shape.dims[0], 2 * shape.dims[1],
                 interleaved};
}

void SetPast(const Inputs& inputs, AttentionProblem* p) {
  if (bool(inputs[kPastKey]) != bool(inputs[kPastValue]))
    Refuse("past_key and past_value go together, but only one of them is given");
  if (!inputs[kPastKey]) return;
  for (Input index : {kPastKey, kPastValue})
    if (inputs[index].shape.rank != 4)
      Refuse(std::string(kInputs[index].name) + " has shape " + inputs[index].shape.text() +
             ", but must have four dimensions [B, kv_num_heads, P, head size]");
  p->past_capacity = inputs[kPastKey].shape.dims[2];
  CheckShape(inputs, kPastKey, {p->batch, p->kv_num_heads, p->past_capacity, p->head_size},
             "[B, kv_num_heads, P, D]");
  CheckShape(inputs, kPastValue, {p->batch, p->kv_num_heads, p->past_capacity, p->value_head_size},
             "[B, kv_num_heads, P, Dv] with past_key's P");
}

// total_sequence_length lies in host memory on every device.
void SetTotal(const Inputs& inputs, AttentionProblem* p) {
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

}  // namespace

void CheckLengths(const AttentionProblem& p) {
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

AttentionProblem MakeProblem(const Attributes& attributes, DType dtype, const Inputs& inputs) {
  AttentionProblem p{};
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
  SetRotation(inputs, attributes.rotary_interleaved, &p);
  p.past_key = p.past_capacity > 0 ? inputs[kPastKey].data : nullptr;
  p.past_value = p.past_capacity > 0 ? inputs[kPastValue].data : nullptr;
  p.seqlens_k = static_cast<const int32_t*>(inputs[kSeqlensK].data);
  p.prompt_length = static_cast<const int32_t*>(inputs[kPromptLength].data);
  p.first_valid = static_cast<const int32_t*>(inputs[kFirstValid].data);
  return p;
}

}  // namespace trianglemix

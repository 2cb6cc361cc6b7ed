// What the graph learns of the outputs before any input is there: shapes, and whose buffers they
// may take.
#include <array>

#include "inputs.h"

namespace trianglemix {
namespace {

using ort::Api;

int64_t InferAttribute(const Api& api, const OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  api.Check(api.ShapeInferContext_GetAttribute(context, name, &attribute));
  api.Check(api.ReadOpAttr(attribute, ort::AttributeType::kInt, &value, sizeof(value), &bytes));
  return value;
}

// An input that is not connected is there, but has no type.
ort::ElementType TypeOf(const Api& api, const OrtTensorTypeAndShapeInfo* input) {
  ort::ElementType type = ort::ElementType::kUndefined;
  if (input != nullptr) api.Check(api.GetTensorElementType(input, &type));
  return type;
}

}  // namespace

// Only the first output: the slots of the present depend on the value of total_sequence_length.
void InferOutputShapes(const Api& api, OrtShapeInferContext* context) {
  // Both belong to the context. Queries, keys and values may come as one tensor.
  OrtTensorTypeAndShapeInfo* query = nullptr;
  OrtTensorTypeAndShapeInfo* value = nullptr;
  api.Check(api.ShapeInferContext_GetInputTypeShape(context, kQuery, &query));
  const bool packed =
      !api.Succeeded(api.ShapeInferContext_GetInputTypeShape(context, kValue, &value)) ||
      TypeOf(api, value) == ort::ElementType::kUndefined;
  const OrtTensorTypeAndShapeInfo* widest = packed ? query : value;
  size_t query_rank = 0, value_rank = 0;
  api.Check(api.GetDimensionsCount(query, &query_rank));
  api.Check(api.GetDimensionsCount(widest, &value_rank));
  if (query_rank != 3 || value_rank != 3) return;
  std::array<int64_t, 3> dims{}, value_dims{};
  std::array<const char*, 3> names{};
  api.Check(api.GetDimensions(query, dims.data(), 3));
  api.Check(api.GetDimensions(widest, value_dims.data(), 3));
  api.Check(api.GetSymbolicDimensions(query, names.data(), 3));
  const int64_t heads = InferAttribute(api, context, "num_heads");
  const int64_t kv_heads = InferAttribute(api, context, "kv_num_heads");
  const int64_t parts = packed ? heads + 2 * kv_heads : kv_heads;
  // ONNX Runtime has no word for an unknown dimension without a name.
  for (int i = 0; i < 2; ++i)
    if (dims[i] < 0 && names[i][0] == '\0') return;
  if (value_dims[2] <= 0 || parts <= 0) return;
  dims[2] = value_dims[2] / parts * heads;
  names[2] = "";
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  api.Check(api.CreateTensorTypeAndShapeInfo(&raw));
  const TypeAndShape output(api, raw);
  api.Check(api.SetTensorElementType(raw, TypeOf(api, query)));
  api.Check(api.SetDimensions(raw, dims.data(), 3));
  api.Check(api.SetSymbolicDimensions(raw, names.data(), 3));
  api.Check(api.ShapeInferContext_SetOutputTypeShape(context, kOutput, raw));
}

size_t CacheInplace(int** inputs, int** outputs) {
  static int from[] = {kPastKey, kPastValue};
  static int to[] = {kPresentKey, kPresentValue};
  *inputs = from;
  *outputs = to;
  return 2;
}

}  // namespace trianglemix

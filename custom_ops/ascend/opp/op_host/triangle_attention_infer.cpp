// Shapes and types of the outputs. Never compiled by CANN.
#include "triangle_attention_functions.h"
#include "triangle_attention_names.h"

namespace {

constexpr int64_t kUnknown = -1;

int64_t Share(int64_t width, int64_t heads, int64_t of) {
  return width < 0 ? kUnknown : width / heads * of;
}

}  // namespace

namespace ge {

// The present has as many slots as the past: a compiled graph cannot know more, since CANN's value
// dependence does not cover int32. Without a past it holds the call's tokens.
graphStatus InferTriangleAttentionShape(gert::InferShapeContext* context) {
  const gert::Shape* query = context->GetRequiredInputShape(triangle::kQuery);
  const gert::Shape* key = context->GetRequiredInputShape(triangle::kKey);
  const gert::Shape* value = context->GetRequiredInputShape(triangle::kValue);
  const gert::Shape* past = context->GetOptionalInputShape(triangle::kPastKey);
  const gert::RuntimeAttrs* attributes = context->GetAttrs();
  if (query == nullptr || key == nullptr || value == nullptr || attributes == nullptr)
    return GRAPH_FAILED;
  const int64_t* heads = attributes->GetAttrPointer<int64_t>(triangle::kHeads);
  const int64_t* kvHeads = attributes->GetAttrPointer<int64_t>(triangle::kKvHeads);
  if (heads == nullptr || kvHeads == nullptr || *heads < 1 || *kvHeads < 1) return GRAPH_FAILED;
  if (query->GetDimNum() != 3 || key->GetDimNum() != 3 || value->GetDimNum() != 3)
    return GRAPH_FAILED;
  const bool held = past != nullptr && past->GetDimNum() == 4 && past->GetDim(2) != 0;
  const int64_t slots = held ? past->GetDim(2) : query->GetDim(1);
  const int64_t headSize = Share(key->GetDim(2), *kvHeads, 1);
  const int64_t valueSize = Share(value->GetDim(2), *kvHeads, 1);
  *context->GetOutputShape(triangle::kAttention) =
      gert::Shape({query->GetDim(0), query->GetDim(1), Share(value->GetDim(2), *kvHeads, *heads)});
  *context->GetOutputShape(triangle::kPresentKey) =
      gert::Shape({query->GetDim(0), *kvHeads, slots, headSize});
  *context->GetOutputShape(triangle::kPresentValue) =
      gert::Shape({query->GetDim(0), *kvHeads, slots, valueSize});
  return GRAPH_SUCCESS;
}

graphStatus InferTriangleAttentionType(gert::InferDataTypeContext* context) {
  const DataType type = context->GetInputDataType(triangle::kQuery);
  for (const size_t output : {triangle::kAttention, triangle::kPresentKey, triangle::kPresentValue})
    context->SetOutputDataType(output, type);
  return GRAPH_SUCCESS;
}

}  // namespace ge

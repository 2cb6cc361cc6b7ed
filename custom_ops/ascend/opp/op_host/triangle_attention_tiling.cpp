// CANN's view of a call turned into its sizes, and the tiling handed back.
// Never compiled by CANN.
#include <cstdio>

#include "tiling/platform/platform_ascendc.h"
#include "triangle_attention_functions.h"
#include "triangle_attention_names.h"
#include "triangle_attention_sizes.h"

namespace {

int64_t IntOf(const gert::RuntimeAttrs& attributes, size_t index, int64_t otherwise) {
  const int64_t* value = attributes.GetAttrPointer<int64_t>(index);
  return value == nullptr ? otherwise : *value;
}

float FloatOf(const gert::RuntimeAttrs& attributes, size_t index) {
  const float* value = attributes.GetAttrPointer<float>(index);
  return value == nullptr ? 0.0f : *value;
}

bool Present(const gert::TilingContext& context, size_t index) {
  return context.GetOptionalInputShape(index) != nullptr;
}

// Pointers that CANN's contract says are there for a node that passed shape inference.
triangle::CallSizes ReadSizes(const gert::TilingContext& context) {
  const gert::Shape& query = context.GetRequiredInputShape(triangle::kQuery)->GetStorageShape();
  const gert::Shape& key = context.GetRequiredInputShape(triangle::kKey)->GetStorageShape();
  const gert::Shape& value = context.GetRequiredInputShape(triangle::kValue)->GetStorageShape();
  const gert::Shape& present = context.GetOutputShape(triangle::kPresentKey)->GetStorageShape();
  const gert::StorageShape* past = context.GetOptionalInputShape(triangle::kPastKey);
  const gert::RuntimeAttrs& attributes = *context.GetAttrs();
  triangle::CallSizes sizes;
  sizes.batch = query.GetDim(0);
  sizes.queryLength = query.GetDim(1);
  sizes.queryWidth = query.GetDim(2);
  sizes.keyWidth = key.GetDim(2);
  sizes.valueWidth = value.GetDim(2);
  sizes.pastSlots = past == nullptr ? 0 : past->GetStorageShape().GetDim(2);
  sizes.presentSlots = present.GetDim(2);
  sizes.heads = IntOf(attributes, triangle::kHeads, 0);
  sizes.kvHeads = IntOf(attributes, triangle::kKvHeads, 0);
  sizes.sink = IntOf(attributes, triangle::kSink, 8);
  sizes.window = IntOf(attributes, triangle::kWindow, 512);
  sizes.last = IntOf(attributes, triangle::kLast, 128);
  sizes.scale = FloatOf(attributes, triangle::kScale);
  sizes.softcap = FloatOf(attributes, triangle::kSoftcap);
  sizes.hasPromptLength = Present(context, triangle::kPromptLength);
  sizes.hasFirstValid = Present(context, triangle::kFirstValid);
  return sizes;
}

triangle::Memories MemoriesOfChip(const platform_ascendc::PlatformAscendC& chip) {
  using platform_ascendc::CoreMemType;
  const auto bytes = [&](CoreMemType type) {
    uint64_t size = 0;
    chip.GetCoreMemSize(type, size);
    return static_cast<int64_t>(size);
  };
  return {bytes(CoreMemType::UB), bytes(CoreMemType::L1), bytes(CoreMemType::L0_A),
          bytes(CoreMemType::L0_B), bytes(CoreMemType::L0_C)};
}

ge::graphStatus Refuse(const std::string& why) {
  std::fprintf(stderr, "trianglemix::TriangleAttention: %s\n", why.c_str());
  return ge::GRAPH_FAILED;
}

}  // namespace

namespace optiling {

ge::graphStatus TileTriangleAttention(gert::TilingContext* context) {
  TriangleAttentionTilingData* data = context->GetTilingData<TriangleAttentionTilingData>();
  if (data == nullptr) return Refuse("no room for the tiling data");
  const platform_ascendc::PlatformAscendC chip(context->GetPlatformInfo());
  std::string refusal = triangle::MakeTiling(ReadSizes(*context), *data);
  if (refusal.empty()) refusal = triangle::CheckMemories(*data, MemoriesOfChip(chip));
  if (!refusal.empty()) return Refuse(refusal);
  // Cube cores, each with its two vector cores; appending the cache alone can use all of them.
  const uint32_t cores = chip.GetCoreNumAic();
  context->SetBlockDim(cores);
  context->SetTilingKey(0);
  context->GetWorkspaceSizes(1)[0] =
      chip.GetLibApiWorkSpaceSize() + cores * static_cast<size_t>(data->workspaceCore);
  return ge::GRAPH_SUCCESS;
}

}  // namespace optiling

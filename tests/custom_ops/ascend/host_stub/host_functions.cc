// The operator's host sources behind C functions, for the tests.
#include "../../../../custom_ops/ascend/opp/framework/onnx_plugin/triangle_attention_plugin.cc"
#include "../../../../custom_ops/ascend/opp/op_host/triangle_attention_def.cpp"
#include "../../../../custom_ops/ascend/opp/op_host/triangle_attention_infer.cpp"
#include "../../../../custom_ops/ascend/opp/op_host/triangle_attention_tiling.cpp"

namespace {

const char* Keep(const std::string& text) {
  static std::string kept;
  kept = text;
  return kept.c_str();
}

gert::Shape ReadShape(const int64_t* dims, int64_t rank) {
  gert::Shape shape;
  for (int64_t i = 0; i < rank; ++i) shape.AppendDim(dims[i]);
  return shape;
}

void ReadAttributes(const int64_t* numbers, const float* scales, gert::RuntimeAttrs& attributes) {
  attributes.integers[triangle::kHeads] = numbers[0];
  attributes.integers[triangle::kKvHeads] = numbers[1];
  attributes.integers[triangle::kSink] = numbers[2];
  attributes.integers[triangle::kWindow] = numbers[3];
  attributes.integers[triangle::kLast] = numbers[4];
  attributes.floats[triangle::kScale] = scales[0];
  attributes.floats[triangle::kSoftcap] = scales[1];
}

}  // namespace

// Lines: members in their order, then the chips.
extern "C" const char* ascend_definition() {
  std::string text;
  for (const ops::OpParamDef& member : ops::LastDefined()->members)
    text += member.text.str() + "\n";
  for (const std::string& chip : ops::LastDefined()->core.chips) text += "chip " + chip + "\n";
  return Keep(text);
}

// "type origin" of the plugin.
extern "C" const char* ascend_plugin() {
  const domi::Registration& plugin = *domi::Registration::Last();
  return Keep(plugin.type + " " + plugin.origins.at(0));
}

// name=value lines that the plugin sets for the parser's text, or "refused".
extern "C" const char* ascend_parse(const char* json, int64_t inputs) {
  ge::Operator from, to;
  if (json != nullptr) from.texts["attribute"] = json;
  from.inputs = static_cast<size_t>(inputs);
  if (domi::Registration::Last()->parse(from, to) != domi::SUCCESS) return "refused";
  std::string text;
  for (const auto& number : to.numbers) text += number.first + "=" + number.second + "\n";
  return Keep(text);
}

// `dims`: query [3], key [3], value [3], past_key [4] (rank 0 in `past_rank`: absent). Then tiles
// the call with the shapes that were inferred. `results`: output [3], present_key [4],
// present_value [4], cores, bytes of workspace. Returns 0, 1 (shapes refused), 2 (tiling refused).
extern "C" int ascend_host(const int64_t* dims, int64_t past_rank, const int64_t* numbers,
                           const float* scales, int64_t* results) {
  gert::InferShapeContext infer;
  for (size_t input = 0; input < 3; ++input) infer.inputs[input] = ReadShape(dims + 3 * input, 3);
  if (past_rank > 0) infer.inputs[triangle::kPastKey] = ReadShape(dims + 9, past_rank);
  ReadAttributes(numbers, scales, infer.attributes);
  const ops::OpDef& op = *ops::LastDefined();
  if (op.inferShape(&infer) != ge::GRAPH_SUCCESS) return 1;
  gert::TilingContext tiling;
  for (const auto& input : infer.inputs)
    tiling.inputs[input.first] = gert::StorageShape(input.second);
  for (const auto& output : infer.outputs) {
    tiling.outputs[output.first] = gert::StorageShape(output.second);
    for (size_t i = 0; i < output.second.GetDimNum(); ++i) *results++ = output.second.GetDim(i);
  }
  tiling.attributes = infer.attributes;
  if (op.core.tiling(&tiling) != ge::GRAPH_SUCCESS) return 2;
  *results++ = tiling.blocks;
  *results++ = static_cast<int64_t>(tiling.workspaces.at(0));
  return 0;
}

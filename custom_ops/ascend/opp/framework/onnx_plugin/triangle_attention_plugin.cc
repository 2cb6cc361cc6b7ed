// Lets atc read an ONNX node trianglemix::TriangleAttention. Inputs and outputs have the same order
// on both sides; attributes are copied. Never compiled by CANN.
#include <cstdio>
#include <cstdlib>

#include "graph/operator.h"
#include "onnx_attributes.h"
#include "register/register.h"

namespace domi {
namespace {

struct Known {
  const char* name;
  const char* type;
  bool required;
};

constexpr Known kKnown[] = {
    {"num_heads", triangle::kOnnxInt, true},
    {"kv_num_heads", triangle::kOnnxInt, true},
    {"scale", triangle::kOnnxFloat, false},
    {"softcap", triangle::kOnnxFloat, false},
    {"num_sink_tokens", triangle::kOnnxInt, false},
    {"sliding_window_size", triangle::kOnnxInt, false},
    {"num_last_tokens", triangle::kOnnxInt, false},
};

constexpr size_t kInputs = 9;

Status Refuse(const std::string& why) {
  std::fprintf(stderr, "trianglemix::TriangleAttention: %s\n", why.c_str());
  return FAILED;
}

// "i" holds an integer attribute, "f" a float one; an integer that is 0 may be left out.
Status CopyAttribute(const Known& known, const triangle::Members& members, ge::Operator& to) {
  const auto type = members.find("type");
  if (type != members.end() && type->second != known.type)
    return Refuse(std::string(known.name) + " has ONNX attribute type " + type->second +
                  ", but must have " + known.type);
  const bool integer = std::string(known.type) == triangle::kOnnxInt;
  const auto value = members.find(integer ? "i" : "f");
  const std::string text = value == members.end() ? "0" : value->second;
  char* end = nullptr;
  if (integer) {
    to.SetAttr(known.name, static_cast<int64_t>(std::strtoll(text.c_str(), &end, 10)));
  } else {
    to.SetAttr(known.name, std::strtof(text.c_str(), &end));
  }
  if (text.empty() || *end != 0)
    return Refuse(std::string(known.name) + " is " + text + ", which is not a number");
  return SUCCESS;
}

bool IsKnown(const std::string& name) {
  for (const Known& known : kKnown)
    if (name == known.name) return true;
  return false;
}

Status ParseTriangleAttention(const ge::Operator& from, ge::Operator& to) {
  ge::AscendString text;
  std::map<std::string, triangle::Members> attributes;
  if (from.GetAttr("attribute", text) != ge::GRAPH_SUCCESS)
    return Refuse("the parser hands over no attributes, but num_heads and kv_num_heads must be");
  if (!triangle::AttributeReader(text.GetString()).Read(attributes))
    return Refuse(std::string("the attributes cannot be read: ") + text.GetString());
  if (from.GetInputsSize() > kInputs)
    return Refuse("the node has " + std::to_string(from.GetInputsSize()) + " inputs, but at most " +
                  std::to_string(kInputs) + " are known here; export without rotation inside it");
  for (const auto& attribute : attributes) {
    if (!IsKnown(attribute.first))
      return Refuse("attribute " + attribute.first +
                    " is not known here; export without rotation inside the node");
  }
  for (const Known& known : kKnown) {
    const auto found = attributes.find(known.name);
    if (found == attributes.end()) {
      if (known.required) return Refuse(std::string("attribute ") + known.name + " is missing");
      continue;
    }
    if (CopyAttribute(known, found->second, to) != SUCCESS) return FAILED;
  }
  return SUCCESS;
}

}  // namespace

REGISTER_CUSTOM_OP("TriangleAttention")
    .FrameworkType(ONNX)
    .OriginOpType({ge::AscendString("trianglemix::1::TriangleAttention")})
    .ParseParamsByOperatorFn(ParseTriangleAttention)
    .ImplyType(ImplyType::TVM);

}  // namespace domi

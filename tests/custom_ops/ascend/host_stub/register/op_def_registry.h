// Stand-in for CANN's header of the same name: an operator's definition, noted as text.
#pragma once

#include <deque>
#include <sstream>
#include <vector>

#include "exe_graph/runtime/context.h"

namespace ops {

enum Option { IGNORE = 0, OPTIONAL = 1, REQUIRED = 2, DYNAMIC = 3 };

class OpParamDef {
 public:
  OpParamDef(const char* what, const char* name) { text << what << ' ' << name; }
  OpParamDef(OpParamDef&&) = default;
  OpParamDef& ParamType(Option kind) { return Note(kind); }
  OpParamDef& AttrType(Option kind) { return Note(kind); }
  OpParamDef& DataType(const std::vector<ge::DataType>& types) {
    for (ge::DataType type : types) Note(type);
    count = types.size();
    return *this;
  }
  OpParamDef& Format(const std::vector<ge::Format>& formats) {
    if (formats.size() != count) text << " formats?";
    return *this;
  }
  OpParamDef& Int() { return Note("int"); }
  OpParamDef& Int(int64_t value) { return Note(value); }
  OpParamDef& Float(float value) { return Note(value); }

  std::ostringstream text;

 private:
  template <typename T>
  OpParamDef& Note(const T& value) {
    text << ' ' << value;
    return *this;
  }
  size_t count = 0;
};

using InferShapeFunction = ge::graphStatus (*)(gert::InferShapeContext*);
using InferTypeFunction = ge::graphStatus (*)(gert::InferDataTypeContext*);
using TilingFunction = ge::graphStatus (*)(gert::TilingContext*);

class OpAICoreDef {
 public:
  OpAICoreDef& SetTiling(TilingFunction function) {
    tiling = function;
    return *this;
  }
  void AddConfig(const char* soc) { chips.push_back(soc); }

  TilingFunction tiling = nullptr;
  std::vector<std::string> chips;
};

class OpDef {
 public:
  explicit OpDef(const char*) {}
  OpParamDef& Input(const char* name) { return Add("input", name); }
  OpParamDef& Output(const char* name) { return Add("output", name); }
  OpParamDef& Attr(const char* name) { return Add("attribute", name); }
  OpDef& SetInferShape(InferShapeFunction function) {
    inferShape = function;
    return *this;
  }
  OpDef& SetInferDataType(InferTypeFunction function) {
    inferType = function;
    return *this;
  }
  OpAICoreDef& AICore() { return core; }

  std::deque<OpParamDef> members;
  InferShapeFunction inferShape = nullptr;
  InferTypeFunction inferType = nullptr;
  OpAICoreDef core;

 private:
  OpParamDef& Add(const char* what, const char* name) {
    members.emplace_back(what, name);
    return members.back();
  }
};

inline OpDef*& LastDefined() {
  static OpDef* last = nullptr;
  return last;
}

#define OP_ADD(TYPE) static OpDef* defined __attribute__((unused)) = LastDefined() = new TYPE(#TYPE)

}  // namespace ops

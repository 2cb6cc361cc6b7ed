// The operator as CANN's graphs see it: inputs, outputs, attributes, types and chips.
// Never compiled by CANN.
#include "register/op_def_registry.h"
#include "triangle_attention_functions.h"

namespace ops {

// Names and order as in custom_ops/contract.py.
class TriangleAttention : public OpDef {
 public:
  explicit TriangleAttention(const char* name) : OpDef(name) {
    for (const char* input : {"query", "key", "value"}) AddTensor(this->Input(input), REQUIRED);
    for (const char* input : {"past_key", "past_value"}) AddTensor(this->Input(input), OPTIONAL);
    for (const char* input : {"seqlens_k", "total_sequence_length"})
      AddLengths(this->Input(input), REQUIRED);
    for (const char* input : {"prompt_length", "first_valid"})
      AddLengths(this->Input(input), OPTIONAL);
    for (const char* output : {"output", "present_key", "present_value"})
      AddTensor(this->Output(output), REQUIRED);
    this->Attr("num_heads").AttrType(REQUIRED).Int();
    this->Attr("kv_num_heads").AttrType(REQUIRED).Int();
    this->Attr("scale").AttrType(OPTIONAL).Float(0.0f);
    this->Attr("softcap").AttrType(OPTIONAL).Float(0.0f);
    this->Attr("num_sink_tokens").AttrType(OPTIONAL).Int(8);
    this->Attr("sliding_window_size").AttrType(OPTIONAL).Int(512);
    this->Attr("num_last_tokens").AttrType(OPTIONAL).Int(128);
    this->SetInferShape(ge::InferTriangleAttentionShape);
    this->SetInferDataType(ge::InferTriangleAttentionType);
    this->AICore().SetTiling(optiling::TileTriangleAttention);
    this->AICore().AddConfig("ascend910b");
    this->AICore().AddConfig("ascend910_93");
  }

 private:
  static void AddTensor(OpParamDef& parameter, Option kind) {
    parameter.ParamType(kind)
        .DataType({ge::DT_FLOAT16, ge::DT_BF16})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND});
  }

  static void AddLengths(OpParamDef& parameter, Option kind) {
    parameter.ParamType(kind)
        .DataType({ge::DT_INT32, ge::DT_INT32})
        .Format({ge::FORMAT_ND, ge::FORMAT_ND});
  }
};

OP_ADD(TriangleAttention);

}  // namespace ops

// What attention operators with a key/value cache share as ONNX Runtime sees them: the inputs,
// outputs and attributes of contract.py, in its order.
#pragma once

#include <array>

#include "../operator.h"

namespace trianglemix {

enum Input : size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kSeqlensK,
  kTotalSequenceLength,
  kPromptLength,
  kFirstValid,
  kCosCache,
  kSinCache,
  kInputCount
};
// The lengths stay on the device; one of them is read on the host.
constexpr std::array<Port, kInputCount> kInputs = {{
    {"query", kKernelType, true, false},
    {"key", kKernelType, false, false},
    {"value", kKernelType, false, false},
    {"past_key", kKernelType, false, false},
    {"past_value", kKernelType, false, false},
    {"seqlens_k", ort::ElementType::kInt32, true, false},
    {"total_sequence_length", ort::ElementType::kInt32, true, true},
    {"prompt_length", ort::ElementType::kInt32, false, false},
    {"first_valid", ort::ElementType::kInt32, false, false},
    {"cos_cache", kKernelType, false, false},
    {"sin_cache", kKernelType, false, false},
}};

enum Output : size_t { kOutput, kPresentKey, kPresentValue, kOutputCount };
constexpr std::array<Port, kOutputCount> kOutputs = {{
    {"output", kKernelType, true, false},
    {"present_key", kKernelType, true, false},
    {"present_value", kKernelType, true, false},
}};

struct Attributes {
  int64_t num_heads;
  int64_t kv_num_heads;
  float scale;
  float softcap;
  Pattern pattern;
  bool rotary_interleaved;
};

// `pattern` holds its defaults. Throws ort::Error for attributes that are missing, of another type
// or out of range.
Attributes ReadAttributes(const ort::Api& api, const OrtKernelInfo* info, Pattern pattern);

// For an operator's own attributes: false where the node lacks it. Throws where it is of another
// type.
bool ReadInt(const ort::Api& api, const OrtKernelInfo* info, const char* name, int64_t* value);
bool ReadFloat(const ort::Api& api, const OrtKernelInfo* info, const char* name, float* value);

// Tells the graph what is known of the first output's shape. Throws ort::Error.
void InferOutputShapes(const ort::Api& api, OrtShapeInferContext* context);

// The cache may be updated in place: past_key to present_key, past_value to present_value.
size_t CacheInplace(int** inputs, int** outputs);

}  // namespace trianglemix

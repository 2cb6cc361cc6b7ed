// Inputs of one call, read from ONNX Runtime and checked.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>

#include "attention.h"

namespace trianglemix {

// Throws an invalid-argument error: what was wrong, the value, what to do.
[[noreturn]] void Refuse(const std::string& message);

std::string Text(int64_t value);

constexpr size_t kMaxRank = 4;

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
  ort::ElementType type = ort::ElementType::kUndefined;
  Shape shape;

  explicit operator bool() const { return value != nullptr; }
};

// Owner of what ONNX Runtime says of a tensor.
class TypeAndShape {
 public:
  TypeAndShape(const ort::Api& api, OrtTensorTypeAndShapeInfo* info) : api_(api), info_(info) {}
  ~TypeAndShape() { api_.ReleaseTensorTypeAndShapeInfo(info_); }
  TypeAndShape(const TypeAndShape&) = delete;
  TypeAndShape& operator=(const TypeAndShape&) = delete;
  OrtTensorTypeAndShapeInfo* get() const { return info_; }

 private:
  const ort::Api& api_;
  OrtTensorTypeAndShapeInfo* info_;
};

using Inputs = std::array<Tensor, kInputCount>;

// `name` is for the message of a tensor that no input of the operator can be.
Tensor ReadTensor(const ort::Api& api, const OrtValue* value, const char* name);

// An absent input is an empty Tensor.
Inputs ReadInputs(const ort::Api& api, const OrtKernelContext* context);

// Everything of the problem but its outputs. Throws ort::Error where types or shapes are no call of
// the operator. On the CPU, CheckLengths() has to follow.
AttentionProblem MakeProblem(const Attributes& attributes, DType dtype, const Inputs& inputs);

// Refuses lengths that no cache can have. They must be in host memory.
void CheckLengths(const AttentionProblem& problem);

}  // namespace trianglemix

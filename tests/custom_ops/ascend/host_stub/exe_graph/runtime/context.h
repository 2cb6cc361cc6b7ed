// Stand-in for CANN's run-time contexts: shapes, attributes and what tiling returns.
#pragma once

#include <map>
#include <vector>

#include "graph/operator.h"

namespace gert {

class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : dims_(dims) {}
  size_t GetDimNum() const { return dims_.size(); }
  int64_t GetDim(size_t index) const { return dims_.at(index); }
  void AppendDim(int64_t dim) { dims_.push_back(dim); }

 private:
  std::vector<int64_t> dims_;
};

class StorageShape {
 public:
  StorageShape() = default;
  explicit StorageShape(const Shape& shape) : shape_(shape) {}
  const Shape& GetStorageShape() const { return shape_; }

 private:
  Shape shape_;
};

class RuntimeAttrs {
 public:
  template <typename T>
  const T* GetAttrPointer(size_t index) const;

  std::map<size_t, int64_t> integers;
  std::map<size_t, float> floats;
};

template <>
inline const int64_t* RuntimeAttrs::GetAttrPointer<int64_t>(size_t index) const {
  const auto found = integers.find(index);
  return found == integers.end() ? nullptr : &found->second;
}

template <>
inline const float* RuntimeAttrs::GetAttrPointer<float>(size_t index) const {
  const auto found = floats.find(index);
  return found == floats.end() ? nullptr : &found->second;
}

template <typename S>
const S* Find(const std::map<size_t, S>& shapes, size_t index) {
  const auto found = shapes.find(index);
  return found == shapes.end() ? nullptr : &found->second;
}

class InferShapeContext {
 public:
  const Shape* GetRequiredInputShape(size_t index) const { return Find(inputs, index); }
  const Shape* GetOptionalInputShape(size_t index) const { return Find(inputs, index); }
  Shape* GetOutputShape(size_t index) { return &outputs[index]; }
  const RuntimeAttrs* GetAttrs() const { return &attributes; }

  std::map<size_t, Shape> inputs, outputs;
  RuntimeAttrs attributes;
};

class InferDataTypeContext {
 public:
  ge::DataType GetInputDataType(size_t index) const { return inputs.at(index); }
  ge::graphStatus SetOutputDataType(size_t index, ge::DataType type) {
    outputs[index] = type;
    return ge::GRAPH_SUCCESS;
  }

  std::map<size_t, ge::DataType> inputs, outputs;
};

class TilingContext {
 public:
  const StorageShape* GetRequiredInputShape(size_t index) const { return Find(inputs, index); }
  const StorageShape* GetOptionalInputShape(size_t index) const { return Find(inputs, index); }
  const StorageShape* GetOutputShape(size_t index) const { return Find(outputs, index); }
  const RuntimeAttrs* GetAttrs() const { return &attributes; }
  void* GetPlatformInfo() const { return nullptr; }
  template <typename T>
  T* GetTilingData() {
    tiling.resize(sizeof(T));
    return reinterpret_cast<T*>(tiling.data());
  }
  ge::graphStatus SetBlockDim(uint32_t count) {
    blocks = count;
    return ge::GRAPH_SUCCESS;
  }
  ge::graphStatus SetTilingKey(uint64_t) { return ge::GRAPH_SUCCESS; }
  size_t* GetWorkspaceSizes(size_t count) {
    workspaces.resize(count);
    return workspaces.data();
  }

  std::map<size_t, StorageShape> inputs, outputs;
  RuntimeAttrs attributes;
  std::vector<char> tiling;
  std::vector<size_t> workspaces;
  uint32_t blocks = 0;
};

}  // namespace gert

// Stand-in for CANN's header of the same name: what the operator's host sources use of it, written
// from public documents.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace ge {

typedef uint32_t graphStatus;
constexpr graphStatus GRAPH_SUCCESS = 0;
constexpr graphStatus GRAPH_FAILED = 0xFFFFFFFF;

enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_BF16 = 27 };
enum Format { FORMAT_ND = 2 };

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char* text) : text_(text) {}
  const char* GetString() const { return text_.c_str(); }

 private:
  std::string text_;
};

class Operator {
 public:
  graphStatus GetAttr(const char* name, AscendString& value) const {
    const auto found = texts.find(name);
    if (found == texts.end()) return GRAPH_FAILED;
    value = AscendString(found->second.c_str());
    return GRAPH_SUCCESS;
  }
  Operator& SetAttr(const char* name, int64_t value) {
    numbers[name] = std::to_string(value);
    return *this;
  }
  Operator& SetAttr(const char* name, float value) {
    numbers[name] = std::to_string(value);
    return *this;
  }
  size_t GetInputsSize() const { return inputs; }

  std::map<std::string, std::string> texts;    // test: what the parser hands over
  std::map<std::string, std::string> numbers;  // test: what the plugin set
  size_t inputs = 0;
};

}  // namespace ge

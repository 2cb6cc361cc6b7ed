// Stand-in for CANN's header of the same name: the registration of an ONNX plugin.
#pragma once

#include <vector>

#include "graph/operator.h"

namespace domi {

typedef uint32_t Status;
constexpr Status SUCCESS = 0;
constexpr Status FAILED = 0xFFFFFFFF;
enum FrameworkType { ONNX = 5 };
enum class ImplyType { TVM = 1 };

using Parse = Status (*)(const ge::Operator&, ge::Operator&);

class Registration {
 public:
  explicit Registration(const char* op) : type(op) {}
  Registration& FrameworkType(domi::FrameworkType) { return *this; }
  Registration& OriginOpType(const std::vector<ge::AscendString>& names) {
    for (const ge::AscendString& name : names) origins.push_back(name.GetString());
    return *this;
  }
  Registration& ParseParamsByOperatorFn(Parse function) {
    parse = function;
    return *this;
  }
  Registration& ImplyType(domi::ImplyType) {
    Last() = this;
    return *this;
  }
  static Registration*& Last() {
    static Registration* last = nullptr;
    return last;
  }

  std::string type;
  std::vector<std::string> origins;
  Parse parse = nullptr;
};

#define REGISTER_CUSTOM_OP(NAME) \
  static const Registration& registered __attribute__((unused)) = (*new Registration(NAME))

}  // namespace domi

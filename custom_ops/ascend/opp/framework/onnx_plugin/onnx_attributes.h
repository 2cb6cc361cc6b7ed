// Reads a node's attributes from the JSON text in which CANN's parser hands them over:
// {"attribute": [{"name": "scale", "type": 1, "f": "0.125"}, ...]}. Numbers may be bare or in
// quotes; what else a member holds is skipped. Never compiled by CANN.
#pragma once

#include <cctype>
#include <map>
#include <string>

namespace triangle {

// Attribute types of ONNX.
constexpr const char* kOnnxFloat = "1";
constexpr const char* kOnnxInt = "2";

// The members of one JSON object by name, each as its text; strings without their quotes.
using Members = std::map<std::string, std::string>;

class AttributeReader {
 public:
  explicit AttributeReader(const std::string& text) : text_(text) {}

  // The node's attributes by name. False: the text is not what is described above.
  bool Read(std::map<std::string, Members>& attributes) {
    Members top;
    if (!ReadObject(top)) return false;
    AttributeReader list(top["attribute"]);
    return top.count("attribute") != 0 && list.ReadList(attributes);
  }

 private:
  bool ReadList(std::map<std::string, Members>& attributes) {
    if (!Take('[')) return false;
    if (Take(']')) return true;
    do {
      Members members;
      if (!ReadObject(members)) return false;
      attributes[members["name"]] = members;
    } while (Take(','));
    return Take(']');
  }

  bool ReadObject(Members& members) {
    if (!Take('{')) return false;
    if (Take('}')) return true;
    do {
      std::string name, value;
      if (!ReadString(name) || !Take(':') || !ReadValue(value)) return false;
      members[name] = value;
    } while (Take(','));
    return Take('}');
  }

  bool ReadValue(std::string& value) {
    SkipSpace();
    if (at_ >= text_.size()) return false;
    if (text_[at_] == '"') return ReadString(value);
    if (text_[at_] == '{' || text_[at_] == '[') return ReadNested(value);
    while (at_ < text_.size() && std::string(",]} \n\r\t").find(text_[at_]) == std::string::npos)
      value += text_[at_++];
    return !value.empty();
  }

  // An object or a list as text, brackets in strings not counted.
  bool ReadNested(std::string& value) {
    const size_t start = at_;
    int depth = 0;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      std::string skipped;
      if (c == '"') {
        if (!ReadString(skipped)) return false;
        continue;
      }
      ++at_;
      if (c == '{' || c == '[') ++depth;
      if ((c == '}' || c == ']') && --depth == 0) {
        value = text_.substr(start, at_ - start);
        return true;
      }
    }
    return false;
  }

  // Escapes stand for the character after them: names and numbers have none that means more.
  bool ReadString(std::string& value) {
    if (!Take('"')) return false;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;
      if (at_ < text_.size()) value += text_[at_++];
    }
    return Take('"');
  }

  bool Take(char wanted) {
    SkipSpace();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void SkipSpace() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  const std::string text_;
  size_t at_ = 0;
};

}  // namespace triangle

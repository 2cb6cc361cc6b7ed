// The node's attributes, checked once, when the session is made.
#include <algorithm>
#include <cmath>

#include "inputs.h"

namespace trianglemix {
namespace {

using ort::Api;

// Positions are below 2^31, so a larger sink, window or last means the same and cannot overflow.
constexpr int64_t kUnbounded = int64_t{1} << 32;

// Whether reading an attribute worked. False: the node lacks it. Another type is refused; only
// ONNX Runtime's message tells the two apart.
bool Found(const Api& api, OrtStatus* status, const char* name, const char* type) {
  if (status == nullptr) return true;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  if (message.find("type") != std::string::npos)
    Refuse(std::string(name) + " is an attribute of another type, but must be " + type);
  return false;
}

void CheckRanges(const Attributes& a) {
  if (a.num_heads < 1 || a.kv_num_heads < 1 || a.num_heads % a.kv_num_heads != 0)
    Refuse("num_heads is " + Text(a.num_heads) + " and kv_num_heads is " + Text(a.kv_num_heads) +
           ", but num_heads must be a positive multiple of kv_num_heads");
  if (!std::isfinite(a.scale))
    Refuse("scale is " + std::to_string(a.scale) + ", but must be finite (0 means 1/sqrt(D))");
  if (!std::isfinite(a.softcap) || a.softcap < 0)
    Refuse("softcap is " + std::to_string(a.softcap) + ", but must be 0 (off) or more");
  if (a.pattern.sink < 0)
    Refuse("num_sink_tokens is " + Text(a.pattern.sink) + ", but must be 0 or more");
  if (a.pattern.window < 1 && a.pattern.window != kDenseWindow)
    Refuse("sliding_window_size is " + Text(a.pattern.window) +
           ", but must be 1 or more, or -1 to keep every key");
  if (a.pattern.last < 1)
    Refuse("num_last_tokens is " + Text(a.pattern.last) + ", but must be 1 or more");
}

}  // namespace

bool ReadInt(const Api& api, const OrtKernelInfo* info, const char* name, int64_t* value) {
  return Found(api, api.KernelInfoGetAttribute_int64(info, name, value), name, "an integer");
}

bool ReadFloat(const Api& api, const OrtKernelInfo* info, const char* name, float* value) {
  return Found(api, api.KernelInfoGetAttribute_float(info, name, value), name, "a float");
}

Attributes ReadAttributes(const Api& api, const OrtKernelInfo* info, Pattern pattern) {
  Attributes a{0, 0, 0.0f, 0.0f, pattern, false};
  if (!ReadInt(api, info, "num_heads", &a.num_heads))
    Refuse("attribute num_heads is missing; give the number of query heads");
  if (!ReadInt(api, info, "kv_num_heads", &a.kv_num_heads))
    Refuse("attribute kv_num_heads is missing; give the number of key/value heads");
  ReadFloat(api, info, "scale", &a.scale);
  ReadFloat(api, info, "softcap", &a.softcap);
  ReadInt(api, info, "num_sink_tokens", &a.pattern.sink);
  ReadInt(api, info, "sliding_window_size", &a.pattern.window);
  ReadInt(api, info, "num_last_tokens", &a.pattern.last);
  int64_t interleaved = 0;
  ReadInt(api, info, "rotary_interleaved", &interleaved);
  if (interleaved != 0 && interleaved != 1)
    Refuse("rotary_interleaved is " + Text(interleaved) + ", but must be 0 or 1");
  a.rotary_interleaved = interleaved == 1;
  CheckRanges(a);
  for (int64_t* bound : {&a.pattern.sink, &a.pattern.window, &a.pattern.last})
    *bound = std::min(*bound, kUnbounded);
  return a;
}

}  // namespace trianglemix

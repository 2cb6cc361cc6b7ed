// Which kernel this processor runs.
#include "attend.h"

namespace trianglemix::cpu {
namespace {

const Variant& Choose() {
#if defined(TRIANGLEMIX_VARIANT)
  return TRIANGLEMIX_VARIANT;  // the test libraries, one for each variant
#elif defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512Variant;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return kAvx2Variant;
#endif
  return kPlainVariant;
}

}  // namespace

const Variant& ChooseVariant() {
  static const Variant& variant = Choose();
  return variant;
}

}  // namespace trianglemix::cpu

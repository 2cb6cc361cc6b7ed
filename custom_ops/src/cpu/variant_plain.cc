// The kernel for every processor: vectors of 16 bytes, which SSE2 and NEON have.
#include "variant.h"

namespace trianglemix::cpu {
namespace {

struct Plain : VectorsOf<4> {
#if defined(__aarch64__)
  // 32 registers: 24 sums.
  static constexpr int kStep = 8;
  static constexpr int kVectors = 3;
#else
  // 16 registers, and a product needs one of its own: 8 sums.
  static constexpr int kStep = 4;
  static constexpr int kVectors = 2;
#endif
  static constexpr int kFewRows = 2;
  static constexpr int kChannelVectors = 2;
  using Narrower = Plain;

  // The second operand where one is NaN.
  static Float Max(Float a, Float b) { return a > b ? a : b; }
};

}  // namespace

const Variant kPlainVariant = MakeVariant<Plain>("plain");

}  // namespace trianglemix::cpu

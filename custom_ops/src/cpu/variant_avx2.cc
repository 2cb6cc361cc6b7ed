// The kernel for AVX2 with FMA and F16C, compiled with these flags alone.
#include "variant.h"

namespace trianglemix::cpu {
namespace {

struct Avx2 : F16cVectors {
  // 4 keys or channels times 3 vectors of rows: 12 of the 16 registers are sums.
  static constexpr int kStep = 4;
  static constexpr int kVectors = 3;
  static constexpr int kFewRows = 4;
  static constexpr int kChannelVectors = 2;
  using Narrower = Avx2;

  // The second operand where one is NaN.
  static Float Max(Float a, Float b) {
    return reinterpret_cast<Float>(
        _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
  }
};

}  // namespace

const Variant kAvx2Variant = MakeVariant<Avx2>("avx2");

}  // namespace trianglemix::cpu

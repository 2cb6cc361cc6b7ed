// The kernel for AVX-512 (F, BW, DQ, VL), compiled with these flags alone.
#include "variant.h"

namespace trianglemix::cpu {
namespace {

struct Avx512 : VectorsOf<16> {
  // 8 keys or channels times 3 vectors of rows: 24 of the 32 registers are sums.
  static constexpr int kStep = 8;
  static constexpr int kVectors = 3;
  static constexpr int kFewRows = 8;
  static constexpr int kChannelVectors = 4;
  using Narrower = F16cVectors;  // part of every such processor: 8 lanes for what 16 leave over
  using VectorsOf<16>::Narrow;
  using VectorsOf<16>::Widen;

  // The second operand where one is NaN.
  static Float Max(Float a, Float b) {
    return reinterpret_cast<Float>(
        _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  }

  // 2^x = 2^(x - floor(x)) * 2^floor(x), each by an instruction; no limits to look after.
  static Float Exp2(Float x) {
    constexpr int kDownKeepNoBits = 0x09;
    const __m512 lanes = reinterpret_cast<__m512>(x);
    const Float r = reinterpret_cast<Float>(_mm512_reduce_ps(lanes, kDownKeepNoBits));
    Float p = Splat(1.8775767e-3f) * r + Splat(8.9893397e-3f);
    p = p * r + Splat(5.5826318e-2f);
    p = p * r + Splat(2.4015361e-1f);
    p = p * r + Splat(6.9315308e-1f);
    p = p * r + Splat(0.99999994f);
    return reinterpret_cast<Float>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), lanes));
  }

  static Float Widen(Float16, const uint16_t* from) {
    return reinterpret_cast<Float>(_mm512_cvtph_ps(LoadAs<__m256i>(from)));
  }
  static Short Narrow(Float16, Float x) {
    return reinterpret_cast<Short>(
        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const Variant kAvx512Variant = MakeVariant<Avx512>("avx512");

}  // namespace trianglemix::cpu

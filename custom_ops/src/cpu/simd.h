// Vectors as GCC and Clang know them, and what they leave out: written once for any width.
//
// Everything is in an unnamed namespace: each instruction set compiles its own copy, and the linker
// must not pick one for all. For the same reason nothing of the standard library is used.
#pragma once

#include <cstdint>

#include "../problem.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace trianglemix::cpu {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls `body` with a value of the type in memory.
template <class Body>
void WithElement(DType dtype, Body&& body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kFloat16) return body(Float16{});
  return body(BFloat16{});
}

template <int width>
struct Lanes;

// GCC converts vectors only where their types depend on no template parameter.
#define TRIANGLEMIX_LANES(width)                                              \
  template <>                                                                 \
  struct Lanes<width> {                                                       \
    using Float __attribute__((vector_size(width * 4))) = float;              \
    using Int __attribute__((vector_size(width * 4))) = int32_t;              \
    using UInt __attribute__((vector_size(width * 4))) = uint32_t;            \
    using Short __attribute__((vector_size(width * 2))) = uint16_t;           \
    static Int ToInt(Short x) { return __builtin_convertvector(x, Int); }     \
    static Short ToShort(Int x) { return __builtin_convertvector(x, Short); } \
    static Float ToFloat(Int x) { return __builtin_convertvector(x, Float); } \
  };
TRIANGLEMIX_LANES(4)
#if defined(__AVX2__)
TRIANGLEMIX_LANES(8)
#endif
#if defined(__AVX512F__)
TRIANGLEMIX_LANES(16)
#endif
#undef TRIANGLEMIX_LANES

// Floats and integers of 32 bits, `width` of them. An instruction set derives from it, adds Max()
// and the sizes of its register tile, and replaces what it has an instruction for.
template <int width>
struct VectorsOf : Lanes<width> {
  static constexpr int kWidth = width;
  using Float = typename Lanes<width>::Float;
  using Int = typename Lanes<width>::Int;
  using UInt = typename Lanes<width>::UInt;
  using Short = typename Lanes<width>::Short;
  using Lanes<width>::ToFloat;
  using Lanes<width>::ToInt;
  using Lanes<width>::ToShort;

  static Float Splat(float x) { return x - Float{}; }
  static Int SplatInt(int32_t x) { return x - Int{}; }

  // 0, 1, 2, ..
  static Int Iota() {
    Int x = {};
    for (int i = 0; i < width; ++i) x[i] = i;
    return x;
  }

  template <typename Vector, typename Scalar>
  static Vector LoadAs(const Scalar* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  static Float Load(const float* from) { return LoadAs<Float>(from); }
  static Int LoadInt(const int32_t* from) { return LoadAs<Int>(from); }
  template <typename Vector, typename Scalar>
  static void Store(Scalar* to, Vector x) {
    __builtin_memcpy(to, &x, sizeof(x));
  }

  // 2^x for x <= 0 with a relative error below 2e-7; 0 below -126.
  static Float Exp2(Float x) {
    const Float magic = Splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x)
    const Float shifted = x + magic;
    const Float r = x - (shifted - magic);
    Float p = Splat(1.3276472e-3f) * r + Splat(9.6755410e-3f);
    p = p * r + Splat(5.5507131e-2f);
    p = p * r + Splat(2.4022120e-1f);
    p = p * r + Splat(6.9314694e-1f);
    p = p * r + Splat(1.0f);
    const UInt exponent = reinterpret_cast<UInt>(shifted) << 23;  // wraps where y is not used
    const Float y = reinterpret_cast<Float>(reinterpret_cast<UInt>(p) + exponent);
    return x < Splat(-126.0f) ? Float{} : y;
  }

  static Float Widen(Float16, const uint16_t* from) {
    const Int half = ToInt(LoadAs<Short>(from));
    const Int sign = (half & 0x8000) << 16;
    const Int rest = half & 0x7fff;
    const Int bias = SplatInt(112 << 23);
    Int normal = (rest << 13) + bias;
    normal = rest >= 0x7c00 ? normal + bias : normal;  // infinities and NaN
    const Float small = ToFloat(rest) * Splat(5.9604644775390625e-8f);
    return reinterpret_cast<Float>(sign | (rest < 0x400 ? reinterpret_cast<Int>(small) : normal));
  }
  static Float Widen(BFloat16, const uint16_t* from) {
    return reinterpret_cast<Float>(ToInt(LoadAs<Short>(from)) << 16);
  }

  // Rounds to nearest, ties to even.
  static Short Narrow(Float16, Float x) {
    const Int bits = reinterpret_cast<Int>(x);
    const Int rest = bits & 0x7fffffff;
    const Int normal = (rest - (112 << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    const Int half = SplatInt(0x3f000000);  // 0.5, whose last bit is that of the small numbers
    const Float small = reinterpret_cast<Float>(rest) + reinterpret_cast<Float>(half);
    Int y = rest < (113 << 23) ? reinterpret_cast<Int>(small) - half : normal;
    y = rest >= 0x477ff000 ? SplatInt(0x7c00) : y;
    y = rest > 0x7f800000 ? SplatInt(0x7e00) : y;
    return ToShort(y | ((bits >> 16) & 0x8000));
  }
  static Short Narrow(BFloat16, Float x) {
    const Int bits = reinterpret_cast<Int>(x);
    const Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Int y = (bits & 0x7fffffff) > 0x7f800000 ? SplatInt(0x7fc0) : rounded;
    return ToShort(y);
  }
};

#if defined(__F16C__)
// Eight lanes with the processor's own conversions of float16.
struct F16cVectors : VectorsOf<8> {
  using VectorsOf<8>::Narrow;
  using VectorsOf<8>::Widen;
  static Float Widen(Float16, const uint16_t* from) {
    return reinterpret_cast<Float>(_mm256_cvtph_ps(LoadAs<__m128i>(from)));
  }
  static Short Narrow(Float16, Float x) {
    return reinterpret_cast<Short>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
  }
};
#endif

// tanh with an error of about 2e-7, relative near zero too.
template <class V>
typename V::Float Tanh(typename V::Float x) {
  using Float = typename V::Float;
  const Float size = x < Float{} ? -x : x;
  const Float z = x * x;
  Float p = V::Splat(-5.70498872745e-3f) * z + V::Splat(2.06390887954e-2f);
  p = p * z + V::Splat(-5.37397155531e-2f);
  p = p * z + V::Splat(1.33314422036e-1f);
  p = p * z + V::Splat(-3.33332819422e-1f);
  const Float small = p * z * x + x;
  const Float t = V::Exp2(size * V::Splat(-2.88539008177792681f));  // e^(-2|x|)
  const Float large = (V::Splat(1.0f) - t) / (V::Splat(1.0f) + t);
  return size < V::Splat(0.625f) ? small : (x < Float{} ? -large : large);
}

// `count` is a multiple of 8.
template <class V>
void WidenAll(const float* from, float* to, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(float));
}

template <class V, class Element>
void WidenAll(const Element* from, float* to, int64_t count) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::Store(to + i, V::Widen(Element{}, bits + i));
  using Tail = typename V::Narrower;
  for (; i < count; i += Tail::kWidth) Tail::Store(to + i, Tail::Widen(Element{}, bits + i));
}

template <class V>
void NarrowAll(const float* from, float* to, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(float));
}

template <class V, class Element>
void NarrowAll(const float* from, Element* to, int64_t count) {
  auto* bits = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth)
    V::Store(bits + i, V::Narrow(Element{}, V::Load(from + i)));
  using Tail = typename V::Narrower;
  for (; i < count; i += Tail::kWidth)
    Tail::Store(bits + i, Tail::Narrow(Element{}, Tail::Load(from + i)));
}

// Swaps the blocks of `distance` lanes off the diagonal of rows i and i + distance.
template <class Float, int distance, int... lanes>
void SwapBlocks(Float& a, Float& b) {
  constexpr int width = sizeof...(lanes);
  const Float upper =
      __builtin_shufflevector(a, b, ((lanes & distance) ? width + lanes - distance : lanes)...);
  b = __builtin_shufflevector(a, b, ((lanes & distance) ? width + lanes : lanes + distance)...);
  a = upper;
}

template <class Float, int distance>
void SwapBlocksOf(Float& a, Float& b) {
  constexpr int width = sizeof(Float) / sizeof(float);
  if constexpr (width == 4) SwapBlocks<Float, distance, 0, 1, 2, 3>(a, b);
  if constexpr (width == 8) SwapBlocks<Float, distance, 0, 1, 2, 3, 4, 5, 6, 7>(a, b);
  if constexpr (width == 16)
    SwapBlocks<Float, distance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b);
}

// Transposes a square of vectors in place.
template <class Float, int width, int distance = width / 2>
void Transpose(Float (&rows)[width]) {
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i)
    if ((i & distance) == 0) SwapBlocksOf<Float, distance>(rows[i], rows[i + distance]);
  if constexpr (distance > 1) Transpose<Float, width, distance / 2>(rows);
}

// Sums of the lanes of each row: lane i of the result is that of rows[i], which are used up.
template <class Float, int width, int distance = width / 2>
Float FoldRows(Float (&rows)[width]) {
#pragma GCC unroll 16
  for (int i = 0; i < distance; ++i) {
    SwapBlocksOf<Float, distance>(rows[i], rows[i + distance]);
    rows[i] += rows[i + distance];
  }
  if constexpr (distance > 1) return FoldRows<Float, width, distance / 2>(rows);
  return rows[0];
}

}  // namespace
}  // namespace trianglemix::cpu

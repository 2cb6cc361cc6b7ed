// half and bfloat16_t as bits, with the conversions that the device's Cast and Mmad do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace shim {

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float HalfToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31;
  const uint32_t mantissa = bits & 1023;
  if (exponent == 31) return FromBits(sign | 0x7F800000 | mantissa << 13);
  const float value = exponent == 0
                          ? std::ldexp(static_cast<float>(mantissa), -24)
                          : std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
  return sign ? -value : value;
}

// To the nearest, ties to even; overflow saturates, as the device does by default.
inline uint16_t FloatToHalf(float x) {
  const uint16_t sign = BitsOf(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7E00;
  if (size >= 65520.0f) return sign | 0x7BFF;
  if (size < 6.103515625e-05f)
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  uint32_t bits = BitsOf(size);
  bits += 0xFFF + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

inline uint16_t FloatToBfloat(float x) {
  const uint32_t bits = BitsOf(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace shim

struct half {
  uint16_t bits;
  half() = default;
  explicit half(float x) : bits(shim::FloatToHalf(x)) {}
  explicit operator float() const {
    static const std::vector<float> table = [] {
      std::vector<float> all(65536);
      for (int i = 0; i < 65536; ++i) all[i] = shim::HalfToFloat(static_cast<uint16_t>(i));
      return all;
    }();
    return table[bits];
  }
};

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float x) : bits(shim::FloatToBfloat(x)) {}
  explicit operator float() const { return shim::FromBits(static_cast<uint32_t>(bits) << 16); }
};

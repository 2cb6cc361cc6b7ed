#include "rotate.h"

#include <cstring>

#include "../tiles.h"
#include "simd.h"

namespace trianglemix::cpu {
namespace {

using V = VectorsOf<4>;
static_assert(kHeadSizeStep % V::kWidth == 0, "a head is a whole number of vectors");

float Widen(float, const float* from) { return *from; }
template <class Half>
float Widen(Half half, const uint16_t* from) {
  const uint16_t lanes[V::kWidth] = {*from};
  return V::Widen(half, lanes)[0];
}

void NarrowVector(float, const float* from, float* to) { std::memcpy(to, from, 4 * V::kWidth); }
template <class Half>
void NarrowVector(Half half, const float* from, uint16_t* to) {
  V::Store(to, V::Narrow(half, V::Load(from)));
}
void WidenVector(float, const float* from, float* to) { std::memcpy(to, from, 4 * V::kWidth); }
template <class Half>
void WidenVector(Half half, const uint16_t* from, float* to) {
  V::Store(to, V::Widen(half, from));
}

// `count` numbers of any count, of which nothing past the last is read.
template <class Element, class Bits>
void WidenRow(const Bits* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) WidenVector(Element{}, from + i, to + i);
  for (; i < count; ++i) to[i] = Widen(Element{}, from + i);
}

// `Bits` is how an Element lies in memory.
template <class Element, class Bits>
void Rotate(const AttentionProblem& p, int64_t position, const Bits* from, Bits* to) {
  const Rotation& rotation = p.rotation;
  const int64_t half = rotation.size / 2, row = position * half;
  float head[kMaxHeadSize], cosines[kMaxHeadSize / 2], sines[kMaxHeadSize / 2];
  WidenRow<Element>(static_cast<const Bits*>(rotation.cos) + row, half, cosines);
  WidenRow<Element>(static_cast<const Bits*>(rotation.sin) + row, half, sines);
  for (int64_t d = 0; d < p.head_size; d += V::kWidth) WidenVector(Element{}, from + d, head + d);
  const int64_t step = rotation.interleaved ? 2 : 1, partner = rotation.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float& x = head[i * step];
    float& y = head[i * step + partner];
    const float turned = x * cosines[i] - y * sines[i];
    y = y * cosines[i] + x * sines[i];
    x = turned;
  }
  for (int64_t d = 0; d < p.head_size; d += V::kWidth) NarrowVector(Element{}, head + d, to + d);
}

template <class Half>
void RotateShort(const AttentionProblem& p, int64_t position, const char* from, char* to) {
  Rotate<Half>(p, position, reinterpret_cast<const uint16_t*>(from),
               reinterpret_cast<uint16_t*>(to));
}

}  // namespace

void RotateHead(const AttentionProblem& p, int64_t position, const char* from, char* to) {
  if (p.rotation.cos == nullptr) {
    std::memcpy(to, from, p.head_size * (p.dtype == DType::kFloat32 ? 4 : 2));
    return;
  }
  const int64_t known = Clamp(position, 0, p.rotation.positions - 1);
  switch (p.dtype) {
    case DType::kFloat32:
      return Rotate<float>(p, known, reinterpret_cast<const float*>(from),
                           reinterpret_cast<float*>(to));
    case DType::kFloat16:
      return RotateShort<Float16>(p, known, from, to);
    case DType::kBFloat16:
      return RotateShort<BFloat16>(p, known, from, to);
  }
}

}  // namespace trianglemix::cpu

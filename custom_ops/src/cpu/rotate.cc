#include "rotate.h"

#include <cstring>

#include "../tiles.h"
#include "simd.h"

namespace trianglemix::cpu {
namespace {

struct V : VectorsOf<4> {
  using Narrower = V;
};
static_assert(kHeadSizeStep % V::kWidth == 0, "a head is a whole number of vectors");

// Any count of numbers as floats, where they lie or in whole vectors of `buffer`; nothing past the
// last is read.
template <class Element>
const float* WidenRow(const Element* from, int64_t count, float* buffer) {
  if constexpr (sizeof(Element) == sizeof(float)) return from;
  const int64_t whole = count / V::kWidth * V::kWidth;
  WidenAll<V>(from, buffer, whole);
  Element rest[V::kWidth] = {};
  for (int64_t i = whole; i < count; ++i) rest[i - whole] = from[i];
  if (whole < count) WidenAll<V>(rest, buffer + whole, V::kWidth);
  return buffer;
}

template <class Element>
void Rotate(const AttentionProblem& p, int64_t position, const Element* from, Element* to) {
  const Rotation& rotation = p.rotation;
  const int64_t half = rotation.size / 2, row = position * half;
  float head[kMaxHeadSize], wide_cos[kMaxHeadSize / 2], wide_sin[kMaxHeadSize / 2];
  const auto* cosines = WidenRow(static_cast<const Element*>(rotation.cos) + row, half, wide_cos);
  const auto* sines = WidenRow(static_cast<const Element*>(rotation.sin) + row, half, wide_sin);
  WidenAll<V>(from, head, p.head_size);
  const int64_t step = rotation.interleaved ? 2 : 1, partner = rotation.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float& x = head[i * step];
    float& y = head[i * step + partner];
    const float turned = x * cosines[i] - y * sines[i];
    y = y * cosines[i] + x * sines[i];
    x = turned;
  }
  NarrowAll<V>(head, to, p.head_size);
}

}  // namespace

void RotateHead(const AttentionProblem& p, int64_t position, const char* from, char* to) {
  if (p.rotation.cos == nullptr) {
    std::memcpy(to, from, p.head_size * BytesOf(p.dtype));
    return;
  }
  const int64_t known = Clamp(position, 0, p.rotation.positions - 1);
  WithElement(p.dtype, [&](auto element) {
    using Element = decltype(element);
    Rotate(p, known, reinterpret_cast<const Element*>(from), reinterpret_cast<Element*>(to));
  });
}

}  // namespace trianglemix::cpu

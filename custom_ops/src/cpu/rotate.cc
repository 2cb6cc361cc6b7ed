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

// Any count, of which nothing past the last is read; whole vectors are written.
template <class Element>
void WidenRow(const Element* from, int64_t count, float* to) {
  const int64_t whole = count / V::kWidth * V::kWidth;
  WidenAll<V>(from, to, whole);
  if (whole == count) return;
  Element rest[V::kWidth] = {};
  for (int64_t i = whole; i < count; ++i) rest[i - whole] = from[i];
  WidenAll<V>(rest, to + whole, V::kWidth);
}

template <class Element>
void Rotate(const AttentionProblem& p, int64_t position, const Element* from, Element* to) {
  const Rotation& rotation = p.rotation;
  const int64_t half = rotation.size / 2, row = position * half;
  float head[kMaxHeadSize], cosines[kMaxHeadSize / 2], sines[kMaxHeadSize / 2];
  WidenRow(static_cast<const Element*>(rotation.cos) + row, half, cosines);
  WidenRow(static_cast<const Element*>(rotation.sin) + row, half, sines);
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

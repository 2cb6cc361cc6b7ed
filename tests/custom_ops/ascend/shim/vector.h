// The vector cores' instructions on float32: repeats of eight 32-byte blocks, with masks.
#pragma once

#include <cmath>

#include "copy.h"

namespace AscendC {

struct UnaryRepeatParams {
  UnaryRepeatParams(uint16_t dstBlk, uint16_t srcBlk, uint8_t dstRep, uint8_t srcRep)
      : dstBlkStride(dstBlk), srcBlkStride(srcBlk), dstRepStride(dstRep), srcRepStride(srcRep) {}
  uint16_t dstBlkStride, srcBlkStride;
  uint8_t dstRepStride, srcRepStride;
};

struct BinaryRepeatParams {
  BinaryRepeatParams(uint8_t dstBlk, uint8_t src0Blk, uint8_t src1Blk, uint8_t dstRep,
                     uint8_t src0Rep, uint8_t src1Rep)
      : dstBlkStride(dstBlk),
        src0BlkStride(src0Blk),
        src1BlkStride(src1Blk),
        dstRepStride(dstRep),
        src0RepStride(src0Rep),
        src1RepStride(src1Rep) {}
  uint8_t dstBlkStride, src0BlkStride, src1BlkStride, dstRepStride, src0RepStride, src1RepStride;
};

struct BrcbRepeatParams {
  BrcbRepeatParams(uint16_t dstBlk, uint16_t dstRep) : dstBlkStride(dstBlk), dstRepStride(dstRep) {}
  uint16_t dstBlkStride, dstRepStride;
};

enum class RoundMode { CAST_NONE, CAST_RINT };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_ONLY_VALUE };

}  // namespace AscendC

namespace shim {

using Floats = AscendC::LocalTensor<float>;

struct Operand {
  const Floats& tensor;
  int64_t blockStride;
  int64_t repeatStride;

  int64_t At(int64_t repeat, int64_t block) const {
    return (repeat * repeatStride + block * blockStride) * 32;
  }
};

inline void CheckOperand(const Floats& tensor, int64_t alignment = 32) {
  SHIM_CHECK(tensor.kind() == kUnified, "a vector instruction works in the unified buffer");
  CheckAligned(tensor.begin(), alignment, "a vector operand");
}

inline uint64_t FirstLanes(uint64_t count) {
  SHIM_CHECK(count >= 1 && count <= 64, "a mask counts 1 to 64 lanes of float32");
  return count == 64 ? ~0ULL : (1ULL << count) - 1;
}

// Calls body(repeat, block, active lanes) for every block of which a lane is active.
template <typename Body>
void ForBlocks(uint64_t mask, int64_t repeats, Body body) {
  for (int64_t repeat = 0; repeat < repeats; ++repeat)
    for (int64_t block = 0; block < 8; ++block)
      if (const int lanes = mask >> (8 * block) & 255) body(repeat, block, lanes);
}

// to = body(a, b) lane by lane; a unary instruction gives its operand twice.
template <typename Body>
void Lanewise(const char* name, const Operand& to, const Operand& a, const Operand& b,
              uint64_t mask, int64_t repeats, Body body) {
  for (const Operand* operand : {&to, &a, &b}) CheckOperand(operand->tensor);
  Instruction by(name, PIPE_V);
  ForBlocks(mask, repeats, [&](int64_t repeat, int64_t block, int lanes) {
    const float* x = a.tensor.Touch(by, a.At(repeat, block), 32, false);
    const float* y = b.tensor.Touch(by, b.At(repeat, block), 32, false);
    float* z = to.tensor.Touch(by, to.At(repeat, block), 32, true);
    for (int lane = 0; lane < 8; ++lane)
      if (lanes >> lane & 1) z[lane] = body(x[lane], y[lane]);
  });
}

template <typename Body>
void Counted(const char* name, const Floats& to, const Floats& a, const Floats& b, int64_t count,
             Body body) {
  for (const Floats* tensor : {&to, &a, &b}) CheckOperand(*tensor);
  Instruction by(name, PIPE_V);
  const float* x = a.Touch(by, 0, count * 4, false);
  const float* y = b.Touch(by, 0, count * 4, false);
  float* z = to.Touch(by, 0, count * 4, true);
  for (int64_t i = 0; i < count; ++i) z[i] = body(x[i], y[i]);
}

}  // namespace shim

namespace AscendC {

#define SHIM_BINARY(NAME, EXPRESSION)                                                              \
  inline void NAME(const shim::Floats& to, const shim::Floats& a, const shim::Floats& b,           \
                   uint64_t lanes, uint8_t repeats, const BinaryRepeatParams& p) {                 \
    shim::Lanewise(#NAME, {to, p.dstBlkStride, p.dstRepStride},                                    \
                   {a, p.src0BlkStride, p.src0RepStride}, {b, p.src1BlkStride, p.src1RepStride},   \
                   shim::FirstLanes(lanes), repeats, [](float x, float y) { return EXPRESSION; }); \
  }                                                                                                \
  inline void NAME(const shim::Floats& to, const shim::Floats& a, const shim::Floats& b,           \
                   int32_t count) {                                                                \
    shim::Counted(#NAME, to, a, b, count, [](float x, float y) { return EXPRESSION; });            \
  }

SHIM_BINARY(Add, x + y)
SHIM_BINARY(Sub, x - y)
SHIM_BINARY(Mul, x* y)
SHIM_BINARY(Div, x / y)
SHIM_BINARY(Max, x > y ? x : y)
#undef SHIM_BINARY

#define SHIM_SCALAR(NAME, EXPRESSION)                                                             \
  inline void NAME(const shim::Floats& to, const shim::Floats& a, float s, uint64_t lanes,        \
                   uint8_t repeats, const UnaryRepeatParams& p) {                                 \
    shim::Lanewise(#NAME, {to, p.dstBlkStride, p.dstRepStride},                                   \
                   {a, p.srcBlkStride, p.srcRepStride}, {a, p.srcBlkStride, p.srcRepStride},      \
                   shim::FirstLanes(lanes), repeats, [s](float x, float) { return EXPRESSION; }); \
  }                                                                                               \
  inline void NAME(const shim::Floats& to, const shim::Floats& a, float s, int32_t count) {       \
    shim::Counted(#NAME, to, a, a, count, [s](float x, float) { return EXPRESSION; });            \
  }

SHIM_SCALAR(Muls, x* s)
SHIM_SCALAR(Adds, x + s)
SHIM_SCALAR(Mins, x < s ? x : s)
SHIM_SCALAR(Maxs, x > s ? x : s)
#undef SHIM_SCALAR

inline void Exp(const shim::Floats& to, const shim::Floats& a, uint64_t lanes, uint8_t repeats,
                const UnaryRepeatParams& p) {
  shim::Lanewise("Exp", {to, p.dstBlkStride, p.dstRepStride}, {a, p.srcBlkStride, p.srcRepStride},
                 {a, p.srcBlkStride, p.srcRepStride}, shim::FirstLanes(lanes), repeats,
                 [](float x, float) { return std::exp(x); });
}

inline void Exp(const shim::Floats& to, const shim::Floats& a, int32_t count) {
  shim::Counted("Exp", to, a, a, count, [](float x, float) { return std::exp(x); });
}

// `mask[0]` names the lanes; 32-bit types use no more than 64.
inline void Duplicate(const shim::Floats& to, float value, uint64_t mask[], uint8_t repeats,
                      uint16_t blockStride, uint8_t repeatStride) {
  shim::CheckOperand(to);
  SHIM_CHECK(mask[0] != 0, "Duplicate with an empty mask");
  shim::Instruction by("Duplicate", PIPE_V);
  const shim::Operand place{to, blockStride, repeatStride};
  shim::ForBlocks(mask[0], repeats, [&](int64_t repeat, int64_t block, int lanes) {
    float* z = to.Touch(by, place.At(repeat, block), 32, true);
    for (int lane = 0; lane < 8; ++lane)
      if (lanes >> lane & 1) z[lane] = value;
  });
}

template <typename T>
void Duplicate(const LocalTensor<T>& to, const T& value, int32_t count) {
  shim::CheckAligned(to.begin(), 32, "a vector operand");
  shim::Instruction by("Duplicate", PIPE_V);
  T* z = to.Touch(by, 0, count * static_cast<int64_t>(sizeof(T)), true);
  for (int32_t i = 0; i < count; ++i) z[i] = value;
}

// Eight values of `from` fill eight blocks.
template <typename T>
void Brcb(const LocalTensor<T>& to, const LocalTensor<T>& from, uint8_t repeats,
          const BrcbRepeatParams& p) {
  static_assert(sizeof(T) == 4, "a block holds 8 elements here");
  shim::CheckOperand(to);
  shim::CheckOperand(from);
  shim::Instruction by("Brcb", PIPE_V);
  for (int64_t i = 0; i < repeats * 8; ++i) {
    const T* x = from.Touch(by, i * 4, 4, false);
    T* z = to.Touch(by, (i / 8 * p.dstRepStride + i % 8 * p.dstBlkStride) * 32, 32, true);
    for (int lane = 0; lane < 8; ++lane) z[lane] = *x;
  }
}

template <typename Body>
void WholeReduce(const char* name, const shim::Floats& to, const shim::Operand& from, int32_t mask,
                 int32_t repeats, int32_t repeatStride, Body body) {
  shim::CheckOperand(to, 8);
  shim::CheckOperand(from.tensor);
  SHIM_CHECK(repeats <= 255, "a reduction repeats at most 255 times");
  shim::Instruction by(name, PIPE_V);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    bool first = true;
    float result = 0;
    shim::ForBlocks(shim::FirstLanes(mask), 1, [&](int64_t, int64_t block, int lanes) {
      const float* x = from.tensor.Touch(by, from.At(repeat, block), 32, false);
      for (int lane = 0; lane < 8; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        result = first ? x[lane] : body(result, x[lane]);
        first = false;
      }
    });
    *to.Touch(by, repeat * repeatStride * 4, 4, true) = result;
  }
}

template <typename T>
void WholeReduceMax(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t mask,
                    int32_t repeats, int32_t repeatStride, int32_t srcBlkStride,
                    int32_t srcRepStride, ReduceOrder order) {
  SHIM_CHECK(order == ReduceOrder::ORDER_ONLY_VALUE, "only ORDER_ONLY_VALUE is in this shim");
  WholeReduce("WholeReduceMax", to, {from, srcBlkStride, srcRepStride}, mask, repeats, repeatStride,
              [](float x, float y) { return x > y ? x : y; });
}

template <typename T>
void WholeReduceSum(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t mask,
                    int32_t repeats, int32_t repeatStride, int32_t srcBlkStride,
                    int32_t srcRepStride) {
  WholeReduce("WholeReduceSum", to, {from, srcBlkStride, srcRepStride}, mask, repeats, repeatStride,
              [](float x, float y) { return x + y; });
}

template <typename T>
void Cast(const LocalTensor<T>& to, const shim::Floats& from, RoundMode mode, uint32_t count) {
  SHIM_CHECK(mode == RoundMode::CAST_RINT, "float32 to 16 bits rounds: CAST_RINT");
  shim::CheckOperand(from);
  shim::CheckAligned(to.begin(), 32, "a vector operand");
  shim::Instruction by("Cast", PIPE_V);
  const float* x = from.Touch(by, 0, count * 4, false);
  T* z = to.Touch(by, 0, count * static_cast<int64_t>(sizeof(T)), true);
  for (uint32_t i = 0; i < count; ++i) z[i] = T(x[i]);
}

}  // namespace AscendC

// LocalTensor and GlobalTensor: a place in a memory, with the bounds of what it may touch.
#pragma once

#include "machine.h"
#include "numbers.h"

#define __aicore__
#define __global__
#define __gm__
typedef uint8_t* GM_ADDR;

namespace AscendC {

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, CO1, VECIN, VECOUT, VECCALC };

}  // namespace AscendC

namespace shim {

inline Kind KindOf(AscendC::TPosition position) {
  switch (position) {
    case AscendC::TPosition::A1:
    case AscendC::TPosition::B1:
      return kL1;
    case AscendC::TPosition::A2:
      return kL0A;
    case AscendC::TPosition::B2:
      return kL0B;
    case AscendC::TPosition::CO1:
      return kL0C;
    default:
      return kUnified;
  }
}

inline void CheckAligned(int64_t at, int64_t alignment, const char* what) {
  SHIM_CHECK(at % alignment == 0,
             Current().name + ": " + what + " starts at byte " + std::to_string(at) +
                 ", which is misaligned: it must be a multiple of " + std::to_string(alignment));
}

}  // namespace shim

namespace AscendC {

template <typename T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(shim::Memory* memory, shim::Kind kind, int64_t begin, int64_t end)
      : memory_(memory), kind_(kind), begin_(begin), end_(end) {}

  LocalTensor operator[](uint32_t offset) const {
    return LocalTensor(memory_, kind_, begin_ + static_cast<int64_t>(offset) * sizeof(T), end_);
  }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(memory_, kind_, begin_, end_);
  }

  shim::Memory& memory() const {
    SHIM_CHECK(memory_ != nullptr, "a LocalTensor without a buffer is used");
    return *memory_;
  }
  shim::Kind kind() const { return kind_; }
  int64_t begin() const { return begin_; }

  // Bytes [at, at + size) from the tensor's start on, within its buffer.
  T* Touch(shim::Instruction& by, int64_t at, int64_t size, bool write,
           bool mustBeWritten = true) const {
    SHIM_CHECK(at >= 0 && begin_ + at + size <= end_,
               by.Says(memory(), begin_ + at) + " overflows its buffer, which ends at byte " +
                   std::to_string(end_));
    if (write) {
      by.Write(memory(), begin_ + at, size);
    } else {
      by.Read(memory(), begin_ + at, size, mustBeWritten);
    }
    return reinterpret_cast<T*>(memory().bytes.data() + begin_ + at);
  }
  T* data() const { return reinterpret_cast<T*>(memory().bytes.data() + begin_); }

 private:
  shim::Memory* memory_ = nullptr;
  shim::Kind kind_ = shim::kUnified;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

template <typename T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(T* buffer) {
    uint8_t* at = reinterpret_cast<uint8_t*>(buffer);
    memory_ = nullptr;
    for (const auto& memory : shim::TheMachine()->global) {
      const int64_t offset = at - memory->bytes.data();
      const int64_t size = static_cast<int64_t>(memory->bytes.size());
      if (offset < 0 || (offset >= size && offset != 0)) continue;
      memory_ = memory.get();
      begin_ = offset;
    }
    SHIM_CHECK(memory_ != nullptr, "SetGlobalBuffer with an address outside of every array");
  }

  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor moved = *this;
    moved.begin_ += static_cast<int64_t>(offset) * static_cast<int64_t>(sizeof(T));
    return moved;
  }

  T GetValue(uint64_t offset) const {
    shim::Instruction read("GetValue", PIPE_S);
    return *Touch(read, static_cast<int64_t>(offset * sizeof(T)), sizeof(T), false);
  }

  T* Touch(shim::Instruction& by, int64_t at, int64_t size, bool write) const {
    SHIM_CHECK(memory_ != nullptr, "a GlobalTensor without a buffer is used");
    if (write) {
      by.Write(*memory_, begin_ + at, size);
    } else {
      by.Read(*memory_, begin_ + at, size);
    }
    return reinterpret_cast<T*>(memory_->bytes.data() + begin_ + at);
  }

 private:
  shim::Memory* memory_ = nullptr;
  int64_t begin_ = 0;
};

}  // namespace AscendC

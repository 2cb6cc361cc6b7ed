// DataCopy between global and local memory, plain and from rows to columns of fractals.
#pragma once

#include "queue.h"

namespace AscendC {

struct DataCopyParams {
  uint16_t blockCount = 1;
  uint16_t blockLen = 0;  // these in 32 bytes
  uint16_t srcStride = 0;
  uint16_t dstStride = 0;
};

struct Nd2NzParams {
  uint16_t ndNum = 0;
  uint16_t nValue = 0;
  uint16_t dValue = 0;
  uint16_t srcNdMatrixStride = 0;
  uint16_t srcDValue = 0;
  uint16_t dstNzC0Stride = 0;
  uint16_t dstNzNStride = 0;
  uint16_t dstNzMatrixStride = 0;
};

template <typename T>
void CheckInto(const LocalTensor<T>& tensor) {
  SHIM_CHECK(tensor.kind() == shim::kUnified || tensor.kind() == shim::kL1,
             "DataCopy moves only to the unified buffer and L1");
  shim::CheckAligned(tensor.begin(), 32, "DataCopy's local tensor");
}

template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyParams& copy) {
  CheckInto(to);
  SHIM_CHECK(copy.blockCount >= 1 && copy.blockCount <= 4095 && copy.blockLen >= 1,
             "DataCopy's blockCount is 1 to 4095 and blockLen 1 or more");
  shim::Instruction move("DataCopy", PIPE_MTE2);
  for (int64_t i = 0; i < copy.blockCount; ++i) {
    const int64_t size = copy.blockLen * 32;
    const T* source = from.Touch(move, i * (copy.blockLen + copy.srcStride) * 32, size, false);
    T* target = to.Touch(move, i * (copy.blockLen + copy.dstStride) * 32, size, true);
    std::memcpy(static_cast<void*>(target), source, size);
  }
}

template <typename T>
void CheckCount(uint32_t count) {
  SHIM_CHECK(count > 0 && count * sizeof(T) % 32 == 0,
             "DataCopy of " + std::to_string(count * sizeof(T)) +
                 " bytes, which is misaligned: it must be a multiple of 32");
}

template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count) {
  CheckInto(to);
  CheckCount<T>(count);
  shim::Instruction move("DataCopy", PIPE_MTE2);
  const T* source = from.Touch(move, 0, count * sizeof(T), false);
  std::memcpy(static_cast<void*>(to.Touch(move, 0, count * sizeof(T), true)), source,
              count * sizeof(T));
}

template <typename T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, uint32_t count) {
  SHIM_CHECK(from.kind() == shim::kUnified,
             "DataCopy to global memory starts in the unified buffer");
  shim::CheckAligned(from.begin(), 32, "DataCopy's local tensor");
  CheckCount<T>(count);
  shim::Instruction move("DataCopy", PIPE_MTE3);
  const T* source = from.Touch(move, 0, count * sizeof(T), false);
  std::memcpy(static_cast<void*>(to.Touch(move, 0, count * sizeof(T), true)), source,
              count * sizeof(T));
}

// Row n, column c of matrix i goes to 32-byte block (c / 16) * C0Stride + n * NStride of its place.
template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, const Nd2NzParams& copy) {
  static_assert(sizeof(T) == 2, "a block holds 16 elements here");
  CheckInto(to);
  SHIM_CHECK(copy.ndNum <= 4095 && copy.nValue <= 16384 && copy.srcDValue >= 1 &&
                 copy.dstNzC0Stride >= 1 && copy.dstNzC0Stride <= 16384 && copy.dstNzNStride >= 1,
             "an Nd2NzParams field is out of its range");
  SHIM_CHECK(copy.dValue % 16 == 0, "columns that are no multiple of 16 are not in this shim");
  shim::Instruction move("DataCopy Nd2Nz", PIPE_MTE2);
  for (int64_t i = 0; i < copy.ndNum; ++i) {
    for (int64_t n = 0; n < copy.nValue; ++n) {
      const int64_t start = i * copy.srcNdMatrixStride + n * copy.srcDValue;
      const T* source = from.Touch(move, start * 2, copy.dValue * 2, false);
      for (int64_t c = 0; c < copy.dValue; c += 16) {
        const int64_t block = c / 16 * copy.dstNzC0Stride + n * copy.dstNzNStride;
        T* target = to.Touch(move, i * copy.dstNzMatrixStride * 2 + block * 32, 32, true);
        std::memcpy(static_cast<void*>(target), source + c, 32);
      }
    }
  }
}

}  // namespace AscendC

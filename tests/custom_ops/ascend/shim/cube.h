// The cube core's instructions: fractals from L1 to L0, products, and their way out.
#pragma once

#include "copy.h"

namespace AscendC {

constexpr int64_t kFractalBytes = 512;

struct LoadData2DParams {
  uint16_t startIndex = 0;
  uint8_t repeatTimes = 0;
  uint16_t srcStride = 0;
  uint8_t sid = 0;
  uint16_t dstGap = 0;
  bool ifTranspose = false;
  uint8_t addrMode = 0;
};

// Fractals of rows that no one wants may hold anything, so what was never written may be loaded.
template <typename T>
void LoadData(const LocalTensor<T>& to, const LocalTensor<T>& from, const LoadData2DParams& load) {
  SHIM_CHECK(from.kind() == shim::kL1 && (to.kind() == shim::kL0A || to.kind() == shim::kL0B),
             "LoadData moves from L1 to L0A or L0B");
  SHIM_CHECK(load.repeatTimes >= 1, "LoadData's repeatTimes is 1 to 255");
  shim::CheckAligned(from.begin(), 32, "LoadData's source");
  shim::CheckAligned(to.begin(), kFractalBytes, "LoadData's destination");
  shim::Instruction move("LoadData", PIPE_MTE1);
  for (int64_t i = 0; i < load.repeatTimes; ++i) {
    const int64_t at = (load.startIndex + i * load.srcStride) * kFractalBytes;
    const T* source = from.Touch(move, at, kFractalBytes, false, false);
    T* target = to.Touch(move, i * (1 + load.dstGap) * kFractalBytes, kFractalBytes, true);
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 16; ++column)
        target[row * 16 + column] =
            source[load.ifTranspose ? column * 16 + row : row * 16 + column];
  }
}

template <typename T>
struct InitConstValueParams {
  uint16_t repeatTimes = 0;
  uint16_t blockNum = 0;
  uint16_t dstGap = 0;
  T initValue{};
};

template <typename T>
void InitConstValue(const LocalTensor<T>& to, const InitConstValueParams<T>& fill) {
  SHIM_CHECK(to.kind() == shim::kL1, "InitConstValue is for L1 in this shim");
  shim::CheckAligned(to.begin(), 32, "InitConstValue's tensor");
  shim::Instruction set("InitConstValue", PIPE_MTE2);
  for (int64_t i = 0; i < fill.repeatTimes; ++i) {
    T* target = to.Touch(set, i * (fill.blockNum + fill.dstGap) * 32, fill.blockNum * 32, true);
    for (int64_t j = 0; j < fill.blockNum * 32 / static_cast<int64_t>(sizeof(T)); ++j)
      target[j] = fill.initValue;
  }
}

struct MmadParams {
  uint16_t m = 0;
  uint16_t n = 0;
  uint16_t k = 0;
  bool cmatrixInitVal = true;
  bool cmatrixSource = false;
};

// left: fractals row by row, each row by row. right: fractals row by row, each column by column.
template <typename T>
void Unpack(const T* left, const T* right, const MmadParams& sizes, std::vector<float>& a,
            std::vector<float>& b) {
  const int64_t m = sizes.m, n = sizes.n, k = sizes.k;
  const int64_t deep = (k + 15) / 16, wide = (n + 15) / 16;
  a.resize(m * k);
  b.resize(k * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t d = 0; d < k; ++d)
      a[i * k + d] =
          static_cast<float>(left[(i / 16 * deep + d / 16) * 256 + i % 16 * 16 + d % 16]);
  for (int64_t d = 0; d < k; ++d)
    for (int64_t j = 0; j < n; ++j)
      b[d * n + j] =
          static_cast<float>(right[(d / 16 * wide + j / 16) * 256 + j % 16 * 16 + d % 16]);
}

template <typename T>
void Mmad(const LocalTensor<float>& sums, const LocalTensor<T>& left, const LocalTensor<T>& right,
          const MmadParams& sizes) {
  SHIM_CHECK(sums.kind() == shim::kL0C && left.kind() == shim::kL0A && right.kind() == shim::kL0B,
             "Mmad takes L0A and L0B to L0C");
  SHIM_CHECK(sizes.m != 1, "Mmad with m = 1 reads its left side as a vector");
  shim::CheckAligned(sums.begin(), 1024, "Mmad's result");
  shim::CheckAligned(left.begin(), kFractalBytes, "Mmad's left side");
  shim::CheckAligned(right.begin(), kFractalBytes, "Mmad's right side");
  shim::Instruction product("Mmad", PIPE_M);
  const int64_t high = (sizes.m + 15) / 16, wide = (sizes.n + 15) / 16, deep = (sizes.k + 15) / 16;
  const T* x = left.Touch(product, 0, high * deep * kFractalBytes, false);
  const T* y = right.Touch(product, 0, deep * wide * kFractalBytes, false);
  const int64_t bytes = high * wide * 1024;
  if (!sizes.cmatrixInitVal) sums.Touch(product, 0, bytes, false);
  float* z = sums.Touch(product, 0, bytes, true);
  std::vector<float> a, b, row(sizes.n);
  Unpack(x, y, sizes, a, b);
  for (int64_t i = 0; i < sizes.m; ++i) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t d = 0; d < sizes.k; ++d)
      for (int64_t j = 0; j < sizes.n; ++j) row[j] += a[i * sizes.k + d] * b[d * sizes.n + j];
    for (int64_t j = 0; j < sizes.n; ++j) {
      float& sum = z[(j / 16 * high + i / 16) * 256 + i % 16 * 16 + j % 16];
      sum = sizes.cmatrixInitVal ? row[j] : sum + row[j];
    }
  }
  if (high * wide >= 10) product.Settle();  // the next one starts late enough
}

enum class CO2Layout : uint8_t { NZ, ROW_MAJOR };
struct FixpipeConfig {
  CO2Layout format;
};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  uint16_t nSize = 0;
  uint16_t mSize = 0;
  uint16_t srcStride = 0;
  uint32_t dstStride = 0;
  uint16_t ndNum = 1;
  uint16_t srcNdStride = 0;
  uint16_t dstNdStride = 0;
};

template <typename T, typename U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& to, const LocalTensor<U>& from,
             const FixpipeParamsV220& store) {
  static_assert(config.format == CO2Layout::ROW_MAJOR && sizeof(T) == 4 && sizeof(U) == 4,
                "only float32 rows are in this shim");
  SHIM_CHECK(from.kind() == shim::kL0C, "Fixpipe starts in L0C");
  SHIM_CHECK(store.nSize >= 1 && store.mSize >= 1 && store.mSize <= 8192 && store.ndNum == 1,
             "a FixpipeParamsV220 field is out of its range");
  shim::CheckAligned(from.begin(), 64, "Fixpipe's source");
  shim::Instruction move("Fixpipe", PIPE_FIX);
  for (int64_t row = 0; row < store.mSize; ++row) {
    float* target = to.Touch(move, row * store.dstStride * 4, store.nSize * 4, true);
    for (int64_t first = 0; first < store.nSize; first += 16) {
      const int64_t count = std::min<int64_t>(16, store.nSize - first);
      const int64_t at = first / 16 * store.srcStride * 16 + row * 16;
      std::memcpy(target + first, from.Touch(move, at * 4, count * 4, false), count * 4);
    }
  }
}

}  // namespace AscendC

// Writes the present cache: the past, with the new tokens at their positions. Bits are copied,
// whatever they hold. Never compiled by CANN.
#pragma once

#include "triangle_attention_call.h"

namespace triangle {

constexpr int64_t kUnitSlots = 128;  // slots of one head that a core writes at once

template <typename T>
class CacheWriter {
 public:
  __aicore__ inline CacheWriter(const Call<T>& call, AscendC::TPipe& pipe) : call_(call) {
    pipe.InitBuffer(copies_, 2, kCopyBytes);
    pipe.InitBuffer(zeros_, 1, kZeroBytes);
  }

  // The vector cores share the (row, head, kUnitSlots slots) of the cache.
  __aicore__ inline void Append() {
    const TriangleAttentionTilingData& data = call_.data;
    const int64_t cores = AscendC::GetBlockNum() * AscendC::GetSubBlockNum();
    const int64_t units = CeilDivide(data.presentSlots, kUnitSlots);
    int64_t before = 0;
    for (int64_t b = 0; b < data.batch; ++b) {
      const BatchRow row = call_.ReadRow(b);
      for (int64_t i = FirstOwned(before, AscendC::GetBlockIdx(), cores); i < units * data.kvHeads;
           i += cores) {
        const Unit unit = UnitAt(b, row, i / units, i % units);
        WriteUnit(unit, data.headSize, call_.pastKey, call_.key, call_.presentKey);
        WriteUnit(unit, data.valueSize, call_.pastValue, call_.value, call_.presentValue);
      }
      before += units * data.kvHeads;
    }
  }

  // `count` zeros from element `at` on.
  __aicore__ inline void StoreZeros(const AscendC::GlobalTensor<T>& to, int64_t at, int64_t count) {
    constexpr int64_t kMost = kZeroBytes / sizeof(T);
    for (int64_t done = 0; done < count; done += kMost) {
      const int64_t part = Smaller(kMost, count - done);
      AscendC::LocalTensor<T> made = zeros_.template AllocTensor<T>();
      AscendC::Duplicate(made.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                         static_cast<int32_t>(part));
      zeros_.EnQue(made);
      AscendC::LocalTensor<T> zeros = zeros_.template DeQue<T>();
      AscendC::DataCopy(to[at + done], zeros, part);
      zeros_.FreeTensor(zeros);
    }
  }

 private:
  // Slots [first, end) of one head of one row; new tokens take [fresh, freshEnd).
  struct Unit {
    int64_t batch;
    int64_t head;
    int64_t first;
    int64_t end;
    int64_t fresh;
    int64_t freshEnd;
  };

  // A row without a live token writes none: its lengths may be impossible.
  __aicore__ inline Unit UnitAt(int64_t b, const BatchRow& row, int64_t head, int64_t index) const {
    const TriangleAttentionTilingData& data = call_.data;
    Unit unit;
    unit.batch = b;
    unit.head = head;
    unit.first = index * kUnitSlots;
    unit.end = Smaller(data.presentSlots, unit.first + kUnitSlots);
    unit.fresh = row.start;
    unit.freshEnd =
        row.end_token > 0 ? Smaller(data.presentSlots, row.start + data.queryLength) : row.start;
    return unit;
  }

  __aicore__ inline void WriteUnit(const Unit& unit, int64_t size,
                                   const AscendC::GlobalTensor<T>& past,
                                   const AscendC::GlobalTensor<T>& fresh,
                                   const AscendC::GlobalTensor<T>& present) {
    const TriangleAttentionTilingData& data = call_.data;
    const int64_t head = unit.batch * data.kvHeads + unit.head;
    const int64_t begin = Clamp(unit.fresh, unit.first, unit.end);
    const int64_t end = Clamp(unit.freshEnd, begin, unit.end);
    KeepPast(head, unit.first, begin, size, past, present);
    if (begin < end) {
      const int64_t pitch = data.kvHeads * size;
      const int64_t token = unit.batch * data.queryLength + begin - unit.fresh;
      CopyRows(present, (head * data.presentSlots + begin) * size, fresh,
               token * pitch + unit.head * size, {end - begin, size, pitch});
    }
    KeepPast(head, end, unit.end, size, past, present);
  }

  // Slots [first, end) as the past has them, zeros where it has none.
  __aicore__ inline void KeepPast(int64_t head, int64_t first, int64_t end, int64_t size,
                                  const AscendC::GlobalTensor<T>& past,
                                  const AscendC::GlobalTensor<T>& present) {
    const TriangleAttentionTilingData& data = call_.data;
    const int64_t held = Clamp(data.pastSlots, first, end);
    if (first < held && !call_.sharedCache) {
      CopyRows(present, (head * data.presentSlots + first) * size, past,
               (head * data.pastSlots + first) * size, {held - first, size, size});
    }
    if (held < end) {
      StoreZeros(present, (head * data.presentSlots + held) * size, (end - held) * size);
    }
  }

  struct Rows {
    int64_t count;
    int64_t size;
    int64_t pitch;  // of the source; the destination's rows touch
  };

  __aicore__ inline void CopyRows(const AscendC::GlobalTensor<T>& to, int64_t at,
                                  const AscendC::GlobalTensor<T>& from, int64_t source,
                                  const Rows& rows) {
    const int64_t most = kCopyBytes / (rows.size * sizeof(T));
    for (int64_t done = 0; done < rows.count; done += most) {
      AscendC::LocalTensor<T> made = copies_.template AllocTensor<T>();
      AscendC::DataCopyParams copy;
      copy.blockCount = Smaller(most, rows.count - done);
      copy.blockLen = rows.size * sizeof(T) / 32;
      copy.srcStride = (rows.pitch - rows.size) * sizeof(T) / 32;
      copy.dstStride = 0;
      AscendC::DataCopy(made, from[source + done * rows.pitch], copy);
      copies_.EnQue(made);
      AscendC::LocalTensor<T> moved = copies_.template DeQue<T>();
      AscendC::DataCopy(to[at + done * rows.size], moved, copy.blockCount * rows.size);
      copies_.FreeTensor(moved);
    }
  }

  const Call<T>& call_;
  AscendC::TQueBind<AscendC::TPosition::VECIN, AscendC::TPosition::VECOUT, 1> copies_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> zeros_;
};

}  // namespace triangle

// Tile shape, workspace and refusals of a call, from its sizes alone: no CANN header, so that it is
// tested where there is none. Never compiled by CANN.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "../op_kernel/triangle_attention_plan.h"

namespace triangle {

// What one call asks for. Head sizes in elements; every element has two bytes.
struct CallSizes {
  int64_t batch;         // B
  int64_t queryLength;   // S
  int64_t queryWidth;    // H * D
  int64_t keyWidth;      // G * D
  int64_t valueWidth;    // G * Dv
  int64_t pastSlots;     // P
  int64_t presentSlots;  // T
  int64_t heads;         // H
  int64_t kvHeads;       // G
  int64_t sink;
  int64_t window;
  int64_t last;
  float scale;
  float softcap;
  bool hasPromptLength;
  bool hasFirstValid;
};

// Memories of a core in bytes.
struct Memories {
  int64_t unified;  // of a vector core
  int64_t l1;       // these of a cube core
  int64_t l0a;
  int64_t l0b;
  int64_t l0c;
};

// What the sources are written for: 910B and 910_93. 8 KiB of the unified buffer are left to the
// system.
constexpr Memories kMemories910b = {184 * 1024, 512 * 1024, 64 * 1024, 64 * 1024, 128 * 1024};

constexpr int64_t kElementBytes = 2;
constexpr int64_t kHeadSizeStep = 16;  // a fractal; and rows are whole 32-byte blocks
constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kMaxStride = 65535;      // elements between rows that a copy can skip
constexpr int64_t kUnbounded = 1LL << 32;  // positions are below 2^31: larger means the same

// What the kernel's buffers take; it asks for the same ones.
inline Memories MemoriesOf(const TriangleAttentionTilingData& data) {
  const int64_t rows = data.tileRows;
  const int64_t half = rows / 2;
  const int64_t state = kStateVectors * kLanes + (1 + kScoreSlots) * kSpread;
  Memories used;
  used.unified = 4 * half * (2 * kBlockKeys + 2 * data.valueSize + kLanes) + 4 * state +
                 kElementBytes * half * Larger(kBlockKeys, data.valueSize) + 2 * kCopyBytes +
                 kZeroBytes;
  used.l1 = kElementBytes * (rows * data.headSize + 2 * rows * kBlockKeys +
                             2 * kBlockKeys * (data.headSize + data.valueSize));
  used.l0a = 2 * rows * kBlockDepth * kElementBytes;
  used.l0b = 2 * kBlockKeys * kBlockDepth * kElementBytes;
  used.l0c = 2 * rows * kBlockKeys * 4;
  return used;
}

inline std::string Text(int64_t value) { return std::to_string(value); }

// Why a call is refused; empty if it is not.
inline std::string RefuseShapes(const CallSizes& sizes) {
  if (sizes.kvHeads < 1 || sizes.heads < 1 || sizes.heads % sizes.kvHeads != 0)
    return "num_heads is " + Text(sizes.heads) + " and kv_num_heads is " + Text(sizes.kvHeads) +
           ", but num_heads must be a positive multiple of kv_num_heads";
  if (sizes.batch < 1 || sizes.queryLength < 1)
    return "query is [" + Text(sizes.batch) + ", " + Text(sizes.queryLength) +
           ", ...], but batch and length must be 1 or more";
  if (sizes.queryWidth % sizes.heads != 0 || sizes.valueWidth % sizes.kvHeads != 0 ||
      sizes.keyWidth != sizes.queryWidth / sizes.heads * sizes.kvHeads)
    return "query, key and value are " + Text(sizes.queryWidth) + ", " + Text(sizes.keyWidth) +
           " and " + Text(sizes.valueWidth) + " wide, which " + Text(sizes.heads) + " and " +
           Text(sizes.kvHeads) + " heads do not share";
  for (const int64_t size : {sizes.queryWidth / sizes.heads, sizes.valueWidth / sizes.kvHeads}) {
    if (size % kHeadSizeStep != 0 || size < kHeadSizeStep || size > kMaxHeadSize)
      return "a head size is " + Text(size) + ", but must be a multiple of 16 from 16 to 256 here";
  }
  for (const int64_t width : {sizes.queryWidth, sizes.keyWidth, sizes.valueWidth}) {
    if (width > kMaxStride)
      return "the heads of a token are " + Text(width) + " elements wide, but at most 65535 can be";
  }
  if (sizes.pastSlots < 0 || sizes.presentSlots < sizes.pastSlots || sizes.presentSlots < 1)
    return "the cache grows from " + Text(sizes.pastSlots) + " to " + Text(sizes.presentSlots) +
           " slots, but can only grow";
  return "";
}

inline std::string RefuseNumbers(const CallSizes& sizes) {
  if (sizes.sink < 0) return "num_sink_tokens is " + Text(sizes.sink) + ", but must be 0 or more";
  if (sizes.window < 1 && sizes.window != -1)
    return "sliding_window_size is " + Text(sizes.window) +
           ", but must be 1 or more, or -1 to keep every key";
  if (sizes.last < 1) return "num_last_tokens is " + Text(sizes.last) + ", but must be 1 or more";
  if (!std::isfinite(sizes.scale))
    return "scale is not finite; give a number, or 0 for 1/sqrt(head size)";
  if (!std::isfinite(sizes.softcap) || sizes.softcap < 0)
    return "softcap is negative or not finite; give 0 (off) or more";
  return "";
}

// Rows of a tile: half of them, with their sums, must fit a vector core.
inline int64_t TileRows(int64_t valueSize) { return valueSize <= 128 ? 128 : 64; }

inline int64_t WorkspaceOfCore(const TriangleAttentionTilingData& data) {
  return kScoreSlots * data.tileRows * ((4 + kElementBytes) * kBlockKeys + 4 * data.valueSize);
}

// Fills `data`, or says why it cannot: what was wrong, the value, what would do.
inline std::string MakeTiling(const CallSizes& sizes, TriangleAttentionTilingData& data) {
  std::string refusal = RefuseShapes(sizes);
  if (refusal.empty()) refusal = RefuseNumbers(sizes);
  if (!refusal.empty()) return refusal;
  data.batch = sizes.batch;
  data.queryLength = sizes.queryLength;
  data.kvHeads = sizes.kvHeads;
  data.groupHeads = sizes.heads / sizes.kvHeads;
  data.headSize = sizes.queryWidth / sizes.heads;
  data.valueSize = sizes.valueWidth / sizes.kvHeads;
  data.pastSlots = sizes.pastSlots;
  data.presentSlots = sizes.presentSlots;
  data.sink = Smaller(sizes.sink, kUnbounded);
  data.window = Smaller(sizes.window, kUnbounded);
  data.last = Smaller(sizes.last, kUnbounded);
  data.tileRows = TileRows(data.valueSize);
  data.tileTokens = data.tileRows / data.groupHeads;
  data.scale = sizes.scale != 0 ? sizes.scale : 1 / std::sqrt(static_cast<float>(data.headSize));
  data.softcap = sizes.softcap;
  data.hasPromptLength = sizes.hasPromptLength;
  data.hasFirstValid = sizes.hasFirstValid;
  data.workspaceCore = WorkspaceOfCore(data);
  if (data.tileTokens < 1)
    return Text(data.groupHeads) + " query heads share a key head, but at most " +
           Text(data.tileRows) + " can with values of size " + Text(data.valueSize);
  return "";
}

// Whether the buffers of a tiling fit a chip; says which does not.
inline std::string CheckMemories(const TriangleAttentionTilingData& data, const Memories& chip) {
  const Memories used = MemoriesOf(data);
  const struct {
    const char* name;
    int64_t used;
    int64_t held;
  } all[] = {{"unified buffer", used.unified, chip.unified},
             {"L1", used.l1, chip.l1},
             {"L0A", used.l0a, chip.l0a},
             {"L0B", used.l0b, chip.l0b},
             {"L0C", used.l0c, chip.l0c}};
  for (const auto& memory : all) {
    if (memory.used > memory.held)
      return std::string("a tile takes ") + Text(memory.used) + " bytes of " + memory.name +
             ", but the chip has " + Text(memory.held);
  }
  return "";
}

}  // namespace triangle

// The kernel for any GPU from sm_80 on: its parameters, tiles, and the instructions it is made of.
#pragma once

#include "launch.h"
#include "masks.cuh"
#include "partial.cuh"

namespace trianglemix {

struct Sm80Params {
  Plan plan;
  Lengths lengths;
  Scratch scratch;
  const void *query, *key, *value;  // [B, S, H*D], [B, G, T, D], [B, G, T, Dv]
  void* output;
};

template <int kHeadSize, int kTileRows>
struct Sm80Tile {
  static constexpr int kD = kHeadSize, kRows = kTileRows, kThreads = 128;
  static constexpr int kStrips = kRows / 64;           // of a warp
  static constexpr int kStages = kStrips > 1 ? 1 : 2;  // tiles of keys and values in memory
  static constexpr int kKeys = sm80_key_tile(kD), kEdge = kKeys - sm80_sinks;
  static constexpr int kLine = 2 * kD;                                // bytes of a row
  static constexpr int kPieces = kD / 8, kStep = kThreads / kPieces;  // rows copied at a time
  static constexpr int kShared = (kRows + 2 * kStages * kKeys) * kLine + 16;
};

// 16 bytes, of which the first `bytes` are read (0: nothing is), the others zero.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

// d[16, 8] += a[16, 16] b[16, 8]
template <typename T>
__device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
#define TM_MULTIPLY(CPP, TYPE)                                                            \
  template <>                                                                             \
  __device__ __forceinline__ void multiply<CPP>(float* d, const uint32_t* a, uint32_t b0, \
                                                uint32_t b1) {                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
TM_MULTIPLY(__nv_bfloat16, "bf16")
TM_MULTIPLY(__half, "f16")

// Byte offset of 16-byte piece `piece` of row `row`.
template <int kD>
__device__ __forceinline__ uint32_t place(int row, int piece) {
  return row * 2 * kD + ((piece ^ (row % 8)) * 16);
}

// The tiles of an item that visits key ranges. Tile 0 holds 16 sinks and the kEdge keys of the
// range that do not fill whole tiles; then come `sink_tiles` of sinks beyond 16, then whole tiles
// of the range. A run comes to its tiles in order, by advance(t).
template <typename Tile>
struct RangeRun {
  const Item& item;
  int sink_tiles, count;

  __device__ RangeRun(const Scratch&, const Item& item) : item(item) {
    sink_tiles = CeilDivide(Larger(0, item.sinks - sm80_sinks), Tile::kKeys);
    const int range = CeilDivide(item.high - item.low - Tile::kEdge, Tile::kKeys);
    count = 1 + sink_tiles + Larger(0, range);
  }
  __device__ int first(int t) const {
    return t <= sink_tiles ? item.first_valid + sm80_sinks + (t - 1) * Tile::kKeys
                           : item.high - (count - t) * Tile::kKeys;
  }
  __device__ int edge() const {
    return item.high - (count - 1 - sink_tiles) * Tile::kKeys - Tile::kEdge;
  }
  __device__ void advance(int) {}
  // Row r of tile t holds key r of the sinks if r < split(t), else key start(t) + r.
  __device__ int split(int t) const { return t == 0 ? sm80_sinks : 0; }
  __device__ int start(int t) const { return t == 0 ? edge() - sm80_sinks : first(t); }
  // Whether all keys of the tile from `first` on exist, in one piece.
  __device__ bool is_whole(int t, int first) const {
    return t > sink_tiles && first >= item.first_valid && first + Tile::kKeys <= item.end;
  }

  template <int kCount>
  __device__ __forceinline__ void mask(float (&s)[kCount], int t, int column,
                                       const int (&positions)[2]) const {
    if (t == 0) {
      const int last = item.sinks - 1 - column;
      mask_causal<0, sm80_sinks / 2>(s, {last, last});
      mask_columns<sm80_sinks / 2, kCount>(s, range_mask(item, edge(), column, positions));
      return;
    }
    const int first_key = first(t);
    if (t <= sink_tiles) {
      const int last = item.first_valid + item.sinks - 1 - first_key - column;
      mask_causal<0, kCount>(s, {last, last});
      return;
    }
    const int whole = Larger(item.low, item.position + item.rows - item.window);
    if (first_key >= whole && first_key + Tile::kKeys <= item.position + 1) return;
    mask_columns<0, kCount>(s, range_mask(item, first_key, column, positions));
  }
};

// The tiles of an item that visits key blocks: those of whole blocks, then from tile `diagonal` on
// those of the rows' own one.
template <typename Tile>
struct BlockRun {
  static constexpr int kOfBlock = kBlock / Tile::kKeys;
  const Item& item;
  BlockCursor blocks;
  int diagonal, count, block = 0;

  __device__ BlockRun(const Scratch& scratch, const Item& item)
      : item(item), blocks(scratch.bits, scratch.words, item) {
    diagonal = item.blocks * kOfBlock;
    count = diagonal + CeilDivide(item.high - item.low, Tile::kKeys);
  }
  __device__ int split(int) const { return 0; }
  __device__ void advance(int t) {
    if (t % kOfBlock == 0) block = item.first_valid + int{kBlock} * blocks.next();
  }
  __device__ int start(int t) const { return block + t % kOfBlock * Tile::kKeys; }
  __device__ bool is_whole(int, int first) const { return first + Tile::kKeys <= item.end; }

  template <int kCount>
  __device__ __forceinline__ void mask(float (&s)[kCount], int t, int column,
                                       const int (&positions)[2]) const {
    if (t < diagonal) return;
    const int first = item.low + (t - diagonal) * Tile::kKeys;
    mask_causal<0, kCount>(s, range_mask(item, first, column, positions).causal);
  }
};

}  // namespace trianglemix

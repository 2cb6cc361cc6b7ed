// The Hopper kernel's results: rows of whole tiles to the output, shares of split ones to scratch.
#pragma once

#include "sm90_tile.cuh"

namespace trianglemix {

// What a warpgroup (`strip` of the tile) has at the end of an item.
template <typename T, int kD, Schedule kSchedule>
struct Results {
  using Tile = Sm90Tile<kD, kSchedule>;
  const Sm90Params& params;
  const Sm90Shared<Tile>& shared;
  const Item& item;
  const int strip, row;  // the lane's first tile row

  __device__ __forceinline__ T* output() const {
    return static_cast<T*>(params.output) + item_offset(params.plan, item);
  }
  __device__ __forceinline__ bool is_used(int tile_row) const {
    return position_of_row(params.plan, tile_row) < item.rows;
  }

  // Rows divided by their sums, to the warp's own rows of the item's queries, which are done with.
  // `base` is where those lie; rows and 16-byte pieces from there are swizzled as the queries were.
  __device__ __forceinline__ static uint32_t place(uint32_t base, int r, int piece) {
    constexpr int kLinePieces = Tile::kSwizzle / 16;
    const int swizzle = Tile::kSwizzle == 128 ? r % 8 : r / 2 % 4;
    return base + (piece / kLinePieces * Tile::kRows + r) * Tile::kSwizzle +
           ((piece % kLinePieces) ^ swizzle) * 16;
  }
  __device__ __forceinline__ void stage(uint32_t base, int lane, const float (&o)[kD / 2],
                                        const OnlineSoftmax& state) const {
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale[r] = state.sum[r] > 0.0f ? __fdividef(1.0f, state.sum[r]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kD / 8; j += 2) {  // 16 rows of 16 columns at a time
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * (j + k / 2) + 2 * (k % 2);
        x[k] = pack2<T>(o[i] * scale[k % 2], o[i + 1] * scale[k % 2]);
      }
      store_matrices(place(base, lane % 16, j + lane / 16), x);
    }
  }

  // All staged rows of the warpgroup by the copy engine. It reads them later.
  __device__ __forceinline__ void send_box(int query) const {
    fence_async_shared();
    named_barrier_sync(1 + strip, 128);
    if (threadIdx.x % 128 != 0) return;
    const int first = position_of_row(params.plan, 64 * strip);
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      tma_store_4d_once(
          &params.out, shared.query(query) + (slab * Tile::kRows + 64 * strip) * Tile::kSwizzle,
          slab * Tile::kSlabColumns, item.group * params.plan.pack, item.row + first, item.b);
    }
    bulk_commit();
  }
  // The warp's staged rows, but those past the item's end.
  __device__ __forceinline__ void send_rows(uint32_t base, int lane) const {
    constexpr int kPieces = kD / 8;
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kPieces / 2; ++i) {
      const int piece = (32 * i + lane) % kPieces, r = (32 * i + lane) / kPieces;
      const int tile_row = row - lane / 4 + r;
      if (!is_used(tile_row)) continue;
      T* target = output() + tile_row_offset(params.plan, tile_row) + 8 * piece;
      __stcs(reinterpret_cast<uint4*>(target), load_shared(place(base, r, piece)));
    }
    fence_async_shared();  // the copy engine writes here next
    __syncwarp();
  }

  // Of a whole item. The place of its queries is in use until bulk_read_wait.
  __device__ __forceinline__ void store(const float (&o)[kD / 2], const OnlineSoftmax& state,
                                        int query) const {
    if constexpr (Tile::kQueries > 1) {
      int lane = threadIdx.x % 32;
      asm volatile("" : "+r"(lane));  // what follows from it is cheap: not kept in registers
      const uint32_t base = shared.query(query) + (row - lane / 4) * Tile::kSwizzle;
      stage(base, lane, o, state);
      if (params.bulk_out && item.rows == params.plan.positions) {
        send_box(query);
      } else {
        send_rows(base, lane);
      }
    } else {  // the queries' place was given back early
      const bool used[2] = {is_used(row), is_used(row + 8)};
      const int offset[2] = {tile_row_offset(params.plan, row),
                             tile_row_offset(params.plan, row + 8)};
      store_rows<T>(output(), o, state, offset, used);
    }
  }

  // Of one share of an item's keys; the last share to arrive adds up all.
  __device__ __forceinline__ void store_share(const float (&o)[kD / 2],
                                              const OnlineSoftmax& state) const {
    const bool used[2] = {is_used(row), is_used(row + 8)};
    store_partial(params.scratch, params.plan, item, o, state, params.plan.exponent, row, used);
    if (!arrives_last(params.scratch, params.plan, item, strip, 1 + strip, 128,
                      shared.flags + strip)) {
      return;
    }
    const int stop = Smaller(item.rows * params.plan.pack, 64 * strip + 64);
    merge_rows(params.scratch, params.plan, item.slot, item.splits, output(),
               64 * strip + threadIdx.x / 32 % 4, stop);
  }
};

}  // namespace trianglemix

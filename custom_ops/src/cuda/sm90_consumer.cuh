// The Hopper kernel's consumers: a warpgroup takes 64 tile rows of every item.
#pragma once

#include "sm90_tile.cuh"
#include "wgmma.cuh"

namespace trianglemix {

// Zeroes the rows of a V tile below `from` and at or past `to`: they hold no key, their bits may be
// NaN, and 0 * NaN is NaN. By 128 threads; slabs lie `stride` bytes apart.
template <int kLine>
__device__ __noinline__ void clear_rows(uint32_t v, int stride, int slabs, int rows, int to,
                                        int from) {
  constexpr int kPieces = kLine / 16;
  for (int i = threadIdx.x % 128; i < slabs * rows * kPieces; i += 128) {
    const int r = i / kPieces % rows, slab = i / kPieces / rows;
    if (r >= from && r < to) continue;
    const uint32_t address = v + slab * stride + r * kLine + i % kPieces * 16;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
  }
}

template <typename T, int kD>
struct Consumer {
  using Tile = Sm90Tile<kD>;
  const Sm90Params& params;
  const Sm90Shared<kD>& shared;
  Ring<Tile::kSlots> slots;
  Ring<Tile::kQueries> queries;
  const int strip, row;  // tile rows 64 * strip ...; the lane's first tile row
  const int column;      // the lane's first column in each 8
  OnlineSoftmax state;

  __device__ Consumer(const Sm90Params& params, const Sm90Shared<kD>& shared)
      : params(params),
        shared(shared),
        strip(threadIdx.x / 128 - 1),
        row(64 * strip + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4),
        column(2 * (threadIdx.x % 4)) {}

  // Position of the lane's row r of two, relative to the item's first. (Registers are scarce here:
  // what is cheap to find again is not kept.)
  __device__ __forceinline__ int relative(int r) const {
    return position_of_row(params.plan, row + 8 * r);
  }

  __device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  }
  template <int kN>
  __device__ __forceinline__ void issue_scores(float (&s)[kN / 2], uint32_t q, uint32_t k) {
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      const int slab = 16 * step / Tile::kSlabColumns, inside = 32 * step % Tile::kSwizzle;
      Wgmma<T>::scores(
          s,
          matrix_descriptor<Tile::kSwizzle>(q + slab * Tile::kRows * Tile::kSwizzle + inside, 16),
          matrix_descriptor<Tile::kSwizzle>(k + slab * kN * Tile::kSwizzle + inside, 16), step > 0);
    }
    wgmma_commit();
  }

  template <int kN>
  __device__ __forceinline__ void issue_values(float (&o)[kD / 2], const uint32_t (&p)[kN / 4],
                                               uint32_t v, bool add) {
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      Wgmma<T>::values(
          o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
          matrix_descriptor<Tile::kSwizzle>(v + step * 16 * Tile::kSwizzle, kN * Tile::kSwizzle),
          add || step > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ static bool is_dead(const Item& item, int first, int count) {
    return (first < item.first_valid && item.first_valid > 0) || first + count > item.end;
  }
  __device__ __forceinline__ void clear_dead_small(uint32_t v, const Item& item, int edge) {
    if (!is_dead(item, item.first_valid, Tile::kSinks) && !is_dead(item, edge, Tile::kEdge)) return;
    constexpr int kLine = Tile::kSwizzle, kStride = Tile::kSmall * Tile::kSwizzle;
    clear_rows<kLine>(v, kStride, Tile::kSlabs, Tile::kSinks, item.end - item.first_valid, 0);
    clear_rows<kLine>(v + Tile::kSinks * kLine, kStride, Tile::kSlabs, Tile::kEdge, item.end - edge,
                      item.first_valid - edge);
    fence_async_shared();
    named_barrier_sync(1 + strip, 128);
  }
  __device__ __forceinline__ void clear_dead_tile(uint32_t v, const Item& item, int first) {
    if (!is_dead(item, first, Tile::kKeys)) return;
    clear_rows<Tile::kSwizzle>(v, Tile::kKeys * Tile::kSwizzle, Tile::kSlabs, Tile::kKeys,
                               item.end - first, item.first_valid - first);
    fence_async_shared();
    named_barrier_sync(1 + strip, 128);
  }

  __device__ __forceinline__ ColumnMask range_mask(const Item& item, int first) {
    ColumnMask mask;
    mask.low = item.low - first - column;
    mask.sink = item.sink_end - first - column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mask.causal[r] = item.position + relative(r) - first - column;
      mask.window[r] = mask.causal[r] - item.window;
    }
    return mask;
  }

  template <int kCount>
  __device__ __forceinline__ void cap(float (&s)[kCount]) {
    if (params.plan.softcap > 0.0f) cap_scores(s, params.plan.scale, params.plan.softcap);
  }

  __device__ __forceinline__ void weigh_small(float (&s)[Tile::kSmall / 2], const Item& item,
                                              int edge) {
    cap(s);
    const int sinks = item.sinks - 1 - column;
    mask_causal<0, Tile::kSinks / 2>(s, {sinks, sinks});
    mask_columns<Tile::kSinks / 2, Tile::kSmall / 2>(s, range_mask(item, edge));
    state.weigh_row(s, params.plan.exponent, 0);
    state.weigh_row(s, params.plan.exponent, 1);
  }

  // Which mask whole tile t needs: most none, the one on the diagonal only its causal half.
  enum class Mask { kNone, kCausal, kSinks, kAll };
  __device__ __forceinline__ Mask mask_of(const Item& item, const KeyTiles<kD>& tiles, int t,
                                          int first) {
    const int whole = max_of(item.low, item.position + item.rows - item.window);
    if (t < tiles.sink_tiles) return Mask::kSinks;
    if (first < whole) return Mask::kAll;
    return first + Tile::kKeys - 1 > item.position ? Mask::kCausal : Mask::kNone;
  }
  __device__ __forceinline__ void mask_tile(float (&s)[Tile::kKeys / 2], const Item& item,
                                            Mask mask, int first) {
    cap(s);
    if (mask == Mask::kNone) return;
    if (mask == Mask::kSinks) {
      const int last = item.first_valid + item.sinks - 1 - first - column;
      mask_causal<0, Tile::kKeys / 2>(s, {last, last});
    } else if (mask == Mask::kAll) {
      mask_columns<0, Tile::kKeys / 2>(s, range_mask(item, first));
    } else {
      mask_causal<0, Tile::kKeys / 2>(s, range_mask(item, first).causal);
    }
  }

  // Scores of tile t beside the values of the tile before it, which is the small one if kFirst.
  template <bool kFirst>
  __device__ __forceinline__ void step(float (&o)[kD / 2], uint32_t (&p)[Tile::kKeys / 4],
                                       uint32_t (&p_small)[Tile::kSmall / 4], const Item& item,
                                       const KeyTiles<kD>& tiles, int t, int query) {
    float s[Tile::kKeys / 2];
    const int k = slots.index;
    mbarrier_wait(shared.full(k), slots.parity);
    slots.advance();
    const int v = slots.index;
    mbarrier_wait(shared.full(v), slots.parity);
    slots.advance();
    if constexpr (kFirst)
      clear_dead_small(shared.slot(v), item, tiles.edge(item));
    else
      clear_dead_tile(shared.slot(v), item, tiles.first(item, t - 1));
    wgmma_fence();
    issue_scores<Tile::kKeys>(s, shared.query(query) + 64 * strip * Tile::kSwizzle, shared.slot(k));
    if constexpr (kFirst)
      issue_values<Tile::kSmall>(o, p_small, shared.slot(v), false);
    else
      issue_values<Tile::kKeys>(o, p, shared.slot(v), true);
    const int first = tiles.first(item, t);
    const Mask mask = mask_of(item, tiles, t, first);
    wgmma_wait<1>();
    pin(s);
    release(shared.empty(k));
    if (Tile::kQueries == 1 && t == tiles.count - 1) release(shared.query_empty(query));
    mask_tile(s, item, mask, first);
    bool moved = state.weigh_row(s, params.plan.exponent, 0);
    state.settle(0);
    wgmma_wait<0>();  // between the rows: the values' slot is free sooner
    pin(o);
    release(shared.empty(v));
    moved |= state.weigh_row(s, params.plan.exponent, 1);
    if (__any_sync(0xffffffff, moved)) rescale(o, state.factor);
    pack_weights<T>(p, s);
  }

  // Rows to the output, through the warp's own rows of the item's queries, which are done with.
  __device__ __forceinline__ void store_rows(const float (&o)[kD / 2], const Item& item,
                                             int query) {
    constexpr int kPieces = kD / 8, kLinePieces = Tile::kSwizzle / 16;  // of 16 bytes
    const int lane = threadIdx.x % 32;
    const uint32_t base = shared.query(query) + (row - lane / 4) * Tile::kSwizzle;
    const auto address = [&](int r, int piece) {
      const int swizzle = Tile::kSwizzle == 128 ? r % 8 : r / 2 % 4;
      return base + (piece / kLinePieces * Tile::kRows + r) * Tile::kSwizzle +
             ((piece % kLinePieces) ^ swizzle) * 16;
    };
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = state.sum[r] > 0.0f ? 1.0f / state.sum[r] : 0.0f;
#pragma unroll
    for (int j = 0; j < kPieces; j += 2) {  // 16 rows of 16 columns at a time
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * (j + k / 2) + 2 * (k % 2);
        x[k] = pack2<T>(o[i] * scale[k % 2], o[i + 1] * scale[k % 2]);
      }
      store_matrices(address(lane % 16, j + lane / 16), x);
    }
    __syncwarp();
    T* output = static_cast<T*>(params.output) + item_offset(params.plan, item);
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const int piece = (32 * i + lane) % kPieces, r = (32 * i + lane) / kPieces;
      const int tile_row = row - lane / 4 + r;
      if (position_of_row(params.plan, tile_row) < item.rows) {
        T* target = output + tile_row_offset(params.plan, tile_row) + 8 * piece;
        __stcs(reinterpret_cast<uint4*>(target), load_shared(address(r, piece)));
      }
    }
    fence_async_shared();  // the copy engine writes here next
    __syncwarp();
  }

  __device__ __forceinline__ void finish(const float (&o)[kD / 2], const Item& item, int query) {
    state.finish();
    if (item.splits == 1 && Tile::kQueries > 1) {
      store_rows(o, item, query);
    } else if (item.splits == 1) {  // the queries' place was given back early
      const bool used[2] = {relative(0) < item.rows, relative(1) < item.rows};
      const int offset[2] = {tile_row_offset(params.plan, row),
                             tile_row_offset(params.plan, row + 8)};
      trianglemix::store_rows<T>(static_cast<T*>(params.output) + item_offset(params.plan, item), o,
                                 state, offset, used);
    } else {
      const bool used[2] = {relative(0) < item.rows, relative(1) < item.rows};
      store_partial(params.scratch, params.plan, item, o, state, params.plan.exponent, row, used);
      if (arrives_last(params.scratch, params.plan, item, strip, 1 + strip, 128,
                       shared.flags + strip)) {
        T* output = static_cast<T*>(params.output) + item_offset(params.plan, item);
        const int stop = min_of(item.rows * params.plan.pack, 64 * strip + 64);
        merge_rows(params.scratch, params.plan, item.slot, item.splits, output,
                   64 * strip + threadIdx.x / 32 % 4, stop);
      }
    }
  }

  // Waits for the next item's queries; its scores of the small tile go into `s`.
  __device__ __forceinline__ const Item& open_item(int taken) {
    mbarrier_wait(shared.query_full(queries.index), queries.parity);
    return shared.items[taken % Tile::kItems];
  }

  __device__ __forceinline__ void skip_slot() {
    mbarrier_wait(shared.full(slots.index), slots.parity);
    release(shared.empty(slots.index));
    slots.advance();
  }

  // Waits for the next slot of the ring to be full, and returns it.
  __device__ __forceinline__ int take_slot() {
    const int slot = slots.index;
    mbarrier_wait(shared.full(slot), slots.parity);
    slots.advance();
    return slot;
  }
  // Scores of the current queries with the small tile in slot k.
  __device__ __forceinline__ void issue_small(float (&s)[Tile::kSmall / 2], int k) {
    issue_scores<Tile::kSmall>(s, shared.query(queries.index) + 64 * strip * Tile::kSwizzle,
                               shared.slot(k));
  }

  __device__ void run() {
    float o[kD / 2], s_small[Tile::kSmall / 2];
    uint32_t p[Tile::kKeys / 4], p_small[Tile::kSmall / 4];
    int taken = 0, k = 0;
    const Item* item = &open_item(taken);
    if (item->rows > 0) {
      k = take_slot();
      wgmma_fence();
      issue_small(s_small, k);
      wgmma_wait<0>();
    }
    while (item->rows > 0) {
      const KeyTiles<kD> tiles(*item);
      const int query = queries.index;
      const bool active = item->rows * params.plan.pack > 64 * strip;
      queries.advance();
      pin(s_small);
      release(shared.empty(k));
      state.reset();
      weigh_small(s_small, *item, tiles.edge(*item));
      pack_weights<T>(p_small, s_small);
      if (active) {
        step<true>(o, p, p_small, *item, tiles, 0, query);
        for (int t = 1; t < tiles.count; ++t) {
          step<false>(o, p, p_small, *item, tiles, t, query);
        }
      } else {
        for (int t = 0; t < 2 * tiles.count; ++t) skip_slot();
        if (Tile::kQueries == 1) release(shared.query_empty(query));
      }
      const Item* next = &open_item(++taken);
      k = slots.index;  // after the last item the scores below are of whatever lies there
      if (next->rows > 0) take_slot();
      const int v = take_slot();
      clear_dead_tile(shared.slot(v), *item, tiles.first(*item, tiles.count - 1));
      wgmma_fence();
      issue_small(s_small, k);
      issue_values<Tile::kKeys>(o, p, shared.slot(v), true);
      wgmma_wait<0>();
      pin(o);
      release(shared.empty(v));
      if (active) finish(o, *item, query);
      if (Tile::kQueries > 1) release(shared.query_empty(query));
      item = next;
    }
  }
};

}  // namespace trianglemix

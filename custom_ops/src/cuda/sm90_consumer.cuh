// What the Hopper kernel's consumers do whatever keys an item visits: the inner loop. A warpgroup
// takes 64 tile rows of every item. Which tiles come in which order, and how items follow each
// other, is in sm90_ranges.cuh and sm90_blocks.cuh.
#pragma once

#include "masks.cuh"
#include "sm90_products.cuh"
#include "sm90_results.cuh"
#include "sm90_tile.cuh"

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

template <typename T, int kD, Schedule kSchedule>
struct Consumer {
  using Tile = Sm90Tile<kD, kSchedule>;
  using Tiles = KeyTiles<kD, kSchedule>;
  const Sm90Params& params;
  const Sm90Shared<Tile>& shared;
  Ring<Tile::kSlots> slots;
  Ring<Tile::kQueries> queries;
  const int strip, row;  // tile rows 64 * strip ...; the lane's first tile row
  const int column;      // the lane's first column in each 8
  OnlineSoftmax state;

  __device__ Consumer(const Sm90Params& params, const Sm90Shared<Tile>& shared)
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
  __device__ __forceinline__ void issue_scores(float (&s)[kN / 2], int query, int slot) {
    issue_products<T, kD, Tile::kSwizzle, Tile::kRows, kN>(
        s, shared.query(query) + 64 * strip * Tile::kSwizzle, shared.slot(slot));
  }

  template <int kN>
  __device__ __forceinline__ void issue_values(float (&o)[kD / 2], const uint32_t (&p)[kN / 4],
                                               int slot, bool add) {
    const uint32_t v = uniform(matrix_descriptor(shared.slot(slot), kN * Tile::kSwizzle));
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      Wgmma<T, Tile::kSwizzle>::values(o, p[4 * step], p[4 * step + 1], p[4 * step + 2],
                                       p[4 * step + 3], v + step * Tile::kSwizzle, add || step > 0);
    }
    wgmma_commit();
  }

  // Whether a tile of the item has rows that hold no key; most items have none.
  __device__ __forceinline__ static bool has_dead(const Item& item, const Tiles& tiles) {
    if constexpr (Tile::kHasSmall) {
      return item.first_valid > Larger(0, tiles.edge(item)) ||
             item.first_valid + Tile::kSinks + tiles.sink_tiles * Tile::kKeys > item.end;
    } else {
      return tiles.first(item, tiles.count) > item.end;
    }
  }
  __device__ __forceinline__ void clear_dead_tile(uint32_t v, const Item& item, int first) {
    clear_rows<Tile::kSwizzle>(v, Tile::kKeys * Tile::kSwizzle, Tile::kSlabs, Tile::kKeys,
                               item.end - first, item.first_valid - first);
    fence_async_shared();
    named_barrier_sync(1 + strip, 128);
  }

  __device__ __forceinline__ ColumnMask mask_of(const Item& item, int first) const {
    return range_mask(item, first, column, {relative(0), relative(1)});
  }

  template <int kCount>
  __device__ __forceinline__ void cap(float (&s)[kCount]) {
    if (params.plan.softcap > 0.0f) cap_scores(s, params.plan.scale, params.plan.softcap);
  }

  // Which whole tiles need neither mask nor cap: from <= t < to, most of them.
  struct Plain {
    int from, to;
  };
  // What is under way in registers: scores and weights of a whole tile, sums.
  struct Fragments {
    float s[Tile::kKeys / 2], o[kD / 2];
    uint32_t p[Tile::kKeys / 4];
  };
  // An item, and what is worth knowing of it beforehand.
  struct Work {
    const Item& item;
    int count;  // whole tiles
    bool dead;
    Plain plain;

    __device__ __forceinline__ int first(int t) const { return Tiles(item).first(item, t); }
  };
  // Whether the warpgroup has rows of the item.
  __device__ __forceinline__ bool is_active(const Item& item) const {
    return item.rows * params.plan.pack > 64 * strip;
  }
  __device__ __forceinline__ Work work_of(const Item& item) {
    const Tiles tiles(item);
    return {item, tiles.count, has_dead(item, tiles), plain_tiles(item, tiles)};
  }
  __device__ __forceinline__ Plain plain_tiles(const Item& item, const Tiles& tiles) {
    int from = 0, to;
    if constexpr (Tile::kHasSmall) {
      const int start = item.high - tiles.count * Tile::kKeys;
      const int whole = Larger(item.low, item.position + item.rows - item.window);
      from = Larger(tiles.sink_tiles, CeilDivide(whole - start, Tile::kKeys));
      to = (item.position + 1 - start) / Tile::kKeys;
    } else {
      to = tiles.diagonal;
    }
    return {params.plan.softcap > 0.0f ? to : from, to};
  }
  __device__ __forceinline__ void mask_tile(float (&s)[Tile::kKeys / 2], const Work& work, int t) {
    const Item& item = work.item;
    const int first = work.first(t);
    cap(s);
    if constexpr (Tile::kHasSmall) {
      if (t < Tiles(item).sink_tiles) {
        const int last = item.first_valid + item.sinks - 1 - first - column;
        return mask_causal<0, Tile::kKeys / 2>(s, {last, last});
      }
      if (first < Larger(item.low, item.position + item.rows - item.window)) {
        return mask_columns<0, Tile::kKeys / 2>(s, mask_of(item, first));
      }
    }
    if (t >= work.plain.to) {  // the diagonal
      mask_causal<0, Tile::kKeys / 2>(s, mask_of(item, first).causal);
    }
  }

  // Where the queries of the item at hand lie: the ring has moved on to the next one's.
  __device__ __forceinline__ int last_query() const {
    return (queries.index + Tile::kQueries - 1) % Tile::kQueries;
  }

  // What follows the scores of tile t: the values of the tile before it are under way behind them.
  __device__ __forceinline__ void weigh_tile(Fragments& f, const Work& work, int t) {
    wgmma_wait<1>();
    pin(f.s);
    release(shared.empty(behind(2)));
    if (Tile::kQueries == 1 && t == work.count - 1) release_queries(0);
    if (t < work.plain.from || t >= work.plain.to) mask_tile(f.s, work, t);
    const bool moved = state.find_peaks(f.s, params.plan.exponent);
    state.weigh(f.s, params.plan.exponent, 0);
    state.settle(0);
    wgmma_wait<0>();  // between the rows: the values' slot is free sooner
    pin(f.o);
    release(shared.empty(behind(1)));
    pack_row<T>(f.p, f.s, 0);
    state.weigh(f.s, params.plan.exponent, 1);
    pack_row<T>(f.p, f.s, 1);
    if (__any_sync(0xffffffff, moved)) rescale(f.o, state.factor);
  }

  // Scores of whole tile t > 0 beside the values of the tile before it, which are added to the sums
  // or become them. `between` runs while the scores are under way.
  template <typename Between>
  __device__ __forceinline__ void step(Fragments& f, const Work& work, int t, bool add,
                                       Between between) {
    const int k = take_slot();
    if (work.dead) {
      mbarrier_wait(shared.full(slots.index), slots.parity);
      clear_dead_tile(shared.slot(slots.index), work.item, work.first(t - 1));
    }
    wgmma_fence();
    issue_scores<Tile::kKeys>(f.s, last_query(), k);
    between();
    const int v = take_slot();  // while the scores are under way
    wgmma_fence();
    issue_values<Tile::kKeys>(f.o, f.p, v, add);
    weigh_tile(f, work, t);
  }

  // Waits for an item's queries; its scores may then be set out for.
  __device__ __forceinline__ const Item& open_item(const Item* item) {
    mbarrier_wait(shared.query_full(queries.index), queries.parity);
    return *item;
  }
  __device__ __forceinline__ const Item* after(const Item* item) const {
    return item == shared.items + Tile::kItems - 1 ? shared.items : item + 1;
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
  // The slot taken `count` slots ago.
  __device__ __forceinline__ int behind(int count) const {
    return slots.index - count + (slots.index < count ? Tile::kSlots : 0);
  }

  // Gives back a place of queries. The item whose they were may be written over, too, and every
  // thread has read it: so each says so for itself.
  __device__ __forceinline__ void release_queries(int place) {
    mbarrier_arrive(shared.query_empty(place));
  }
  // Gives back the place of the queries of the item before, once its rows have left it.
  __device__ __forceinline__ void give_queries() {
    if (Tile::kQueries == 1) return;
    if (threadIdx.x % 128 == 0) bulk_read_wait();
    release_queries(queries.index);
  }

  __device__ __forceinline__ Results<T, kD, kSchedule> results(const Item& item) const {
    return {params, shared, item, strip, row};
  }
  // Rows of a whole item, over its queries at `place`.
  __device__ __forceinline__ void store(Fragments& f, OnlineSoftmax ended, const Item& item,
                                        int place) {
    ended.finish();
    if (is_active(item)) results(item).store(f.o, ended, place);
  }
  __device__ __forceinline__ void store_share(Fragments& f, OnlineSoftmax ended, const Item& item) {
    ended.finish();
    if (is_active(item)) results(item).store_share(f.o, ended);
  }
};

}  // namespace trianglemix

// The Hopper kernel's producer, which draws work items and streams their tiles: one thread, or for
// keys by pages a warp, whose lanes all know what the first one does.
#pragma once

#include "sm90_pages.cuh"
#include "sm90_tile.cuh"

namespace trianglemix {

// An item between its fetching and its use, in registers: of one thread, or spread over a warp.
template <int kThreads>
struct HeldItem;

template <>
struct HeldItem<1> {
  Item item;

  __device__ __forceinline__ void clear() { item.rows = 0; }
  __device__ __forceinline__ void load(const int4* source) {
#pragma unroll
    for (int i = 0; i < sizeof(Item) / 16; ++i) reinterpret_cast<int4*>(&item)[i] = source[i];
  }
  __device__ __forceinline__ int rows() const { return item.rows; }
  __device__ __forceinline__ void store(Item& target) const { target = item; }
};

template <>
struct HeldItem<32> {
  static constexpr int kParts = sizeof(Item) / 16, kRows = offsetof(Item, rows);
  static_assert(kRows % 16 == 0, "rows are the first number of a part");
  int4 part;  // of lane i, the i-th

  __device__ __forceinline__ void clear() { part = {0, 0, 0, 0}; }
  __device__ __forceinline__ void load(const int4* source) {
    if (threadIdx.x % 32 < kParts) part = source[threadIdx.x % 32];
  }
  __device__ __forceinline__ int rows() const {
    return __shfl_sync(0xffffffff, part.x, kRows / 16);
  }
  __device__ __forceinline__ void store(Item& target) const {
    if (threadIdx.x % 32 < kParts) reinterpret_cast<int4*>(&target)[threadIdx.x % 32] = part;
    __syncwarp();
  }
};

template <int kD, Schedule kSchedule, Layout kLayout>
struct Producer {
  using Tile = Sm90Tile<kD, kSchedule>;
  using Params = ParamsOf<Sm90Params, kLayout>;
  using Place = std::conditional_t<kLayout == Layout::kPages, PagedPlace, int>;  // of a tile
  const Params& params;
  const Sm90Shared<Tile>& shared;
  Ring<Tile::kSlots> slots;
  Ring<Tile::kQueries> queries;
  int number, produced = 0;
  // The item after the one being loaded, fetched while that one's tiles are.
  HeldItem<kLoaders<kLayout>> ahead;

  __device__ Producer(const Params& params, const Sm90Shared<Tile>& shared)
      : params(params), shared(shared), number(blockIdx.x) {}

  __device__ __forceinline__ void fetch() {
    ahead.clear();
    if (number >= params.plan.items) return;
    ahead.load(reinterpret_cast<const int4*>(params.scratch.items + number));
    int drawn = 0;
    if (leads<kLayout>()) drawn = atomicAdd(params.scratch.next_item, 1);
    if (kLoaders<kLayout> > 1) drawn = __shfl_sync(0xffffffff, drawn, 0);
    number = gridDim.x + drawn;
  }

  // The next item with any rows, in shared memory for the consumers; rows == 0 after the last. Its
  // place in the ring is free: with the queries of the item before it, the one that was here ended.
  __device__ __forceinline__ const Item& next_item() {
    while (ahead.rows() == 0 && number < params.plan.items) fetch();
    Item& target = shared.items[produced++ % Tile::kItems];
    ahead.store(target);
    return target;
  }

  __device__ void load_queries(const Item& item) {
    // With two places, one comes free while the item in the other begins: at the first item, too.
    mbarrier_wait(shared.query_empty(queries.index), queries.parity ^ (queries.index == 0));
    const uint32_t barrier = shared.query_full(queries.index);
    if (item.rows == 0) {
      if (leads<kLayout>()) mbarrier_arrive(barrier);
      return;
    }
    if (leads<kLayout>()) {
      mbarrier_expect(barrier, params.plan.positions * params.plan.pack * kD * 2);
    }
    for (int slab = 0; slab < Tile::kSlabs && leads<kLayout>(); ++slab) {
      tma_load_4d_once(shared.query(queries.index) + slab * Tile::kRows * Tile::kSwizzle,
                       &params.query, barrier, slab * Tile::kSlabColumns,
                       item.group * params.plan.pack, item.row, item.b);
    }
    queries.advance();
  }

  // Waits for a free slot and promises `keys` rows to it.
  __device__ uint32_t open_slot(int keys) {
    mbarrier_wait(shared.empty(slots.index), slots.parity ^ 1);
    if (leads<kLayout>()) mbarrier_expect(shared.full(slots.index), keys * kD * 2);
    return shared.slot(slots.index);
  }

  __device__ void load_box(const CUtensorMap& map, const Item& item, uint32_t target, int stride,
                           int first) {
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      tma_load_3d(target + slab * stride * Tile::kSwizzle, &map, shared.full(slots.index),
                  slab * Tile::kSlabColumns, first, item.b * params.plan.kv_heads + item.kv_head);
    }
  }
  __device__ Place place(const Item& item, int first) const {
    if constexpr (kLayout == Layout::kPages) {
      return find_pages<Tile>(params.pages, item.b, first, item.end);
    } else {
      return first;
    }
  }
  __device__ void load_tile(const CUtensorMap& map, const Item& item, const Place& place) {
    const uint32_t target = open_slot(Tile::kKeys);
    if constexpr (kLayout == Layout::kPages) {
      load_pages<Tile>(params.pages, map, target, shared.full(slots.index), item.kv_head, place);
    } else {
      load_box(map, item, target, Tile::kKeys, place);
    }
    slots.advance();
  }
  __device__ void load_small(const CUtensorMap& map, const Item& item, int edge) {
    const uint32_t target = open_slot(Tile::kSmall);
#pragma unroll 1
    for (int row = 0; row < Tile::kSmall; row += Tile::kSinks) {
      const int first = row == 0 ? item.first_valid : edge + row - Tile::kSinks;
      load_box(map, item, target + row * Tile::kSwizzle, Tile::kSmall, first);
    }
    slots.advance();
  }

  // Tiles in the order in which the consumers take them: keys, then the values of the tile before.
  __device__ void run() {
    const CUtensorMap* const maps[] = {&params.query, &params.key, &params.value, &params.key_small,
                                       &params.value_small};
#pragma unroll
    for (int i = 0; i < (Tile::kHasSmall ? 5 : 3); ++i) tma_prefetch(maps[i]);
    const Item* item = nullptr;
    previous_grid_wait();  // for the keys, the list of items and zeroed counters
    fetch();
    Place before{};  // of the tile whose values are next
    while (true) {
      const Item& next = next_item();
      load_queries(next);
      const Place last = before;  // of the item before
      KeyCursor<kD, kSchedule> keys(params.scratch, next);
      if (next.rows > 0) {
        if constexpr (Tile::kHasSmall) {
          load_small(params.key_small, next, keys.tiles.edge(next));
        } else {
          before = place(next, keys.next(next));
          load_tile(params.key, next, before);
        }
      }
      if (item != nullptr) load_tile(params.value, *item, last);
      if (next.rows == 0) return;
      item = &next;
      fetch();
#pragma unroll 1
      for (int t = Tile::kHasSmall ? 0 : 1; t < keys.tiles.count; ++t) {
        const Place at = place(next, keys.next(next));
        load_tile(params.key, next, at);
        if (Tile::kHasSmall && t == 0) {
          if constexpr (Tile::kHasSmall)
            load_small(params.value_small, next, keys.tiles.edge(next));
        } else {
          load_tile(params.value, next, before);
        }
        before = at;
      }
    }
  }
};

}  // namespace trianglemix

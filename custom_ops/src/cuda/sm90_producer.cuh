// The Hopper kernel's producer: one thread that draws work items and streams their tiles.
#pragma once

#include "sm90_tile.cuh"

namespace trianglemix {

template <int kD, Schedule kSchedule>
struct Producer {
  using Tile = Sm90Tile<kD, kSchedule>;
  const Sm90Params& params;
  const Sm90Shared<Tile>& shared;
  Ring<Tile::kSlots> slots;
  Ring<Tile::kQueries> queries;
  int number, produced = 0;
  Item ahead;  // the item after the one being loaded, fetched while that one's tiles are

  __device__ Producer(const Sm90Params& params, const Sm90Shared<Tile>& shared)
      : params(params), shared(shared), number(blockIdx.x) {}

  __device__ __forceinline__ void fetch() {
    ahead.rows = 0;
    if (number >= params.plan.items) return;
    const int4* source = reinterpret_cast<const int4*>(params.scratch.items + number);
#pragma unroll
    for (int i = 0; i < sizeof(Item) / 16; ++i) reinterpret_cast<int4*>(&ahead)[i] = source[i];
    number = gridDim.x + atomicAdd(params.scratch.next_item, 1);
  }

  // The next item with any rows, in shared memory for the consumers; rows == 0 after the last. Its
  // place in the ring is free: with the queries of the item before it, the one that was here ended.
  __device__ __forceinline__ const Item& next_item() {
    while (ahead.rows == 0 && number < params.plan.items) fetch();
    Item& target = shared.items[produced++ % Tile::kItems];
    target = ahead;
    return target;
  }

  __device__ void load_queries(const Item& item) {
    // With two places, one comes free while the item in the other begins: at the first item, too.
    mbarrier_wait(shared.query_empty(queries.index), queries.parity ^ (queries.index == 0));
    const uint32_t barrier = shared.query_full(queries.index);
    if (item.rows == 0) return mbarrier_arrive(barrier);
    mbarrier_expect(barrier, params.plan.positions * params.plan.pack * kD * 2);
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      tma_load_4d_once(shared.query(queries.index) + slab * Tile::kRows * Tile::kSwizzle,
                       &params.query, barrier, slab * Tile::kSlabColumns,
                       item.group * params.plan.pack, item.row, item.b);
    }
    queries.advance();
  }

  // Waits for a free slot and promises `keys` rows to it.
  __device__ uint32_t open_slot(int keys) {
    mbarrier_wait(shared.empty(slots.index), slots.parity ^ 1);
    mbarrier_expect(shared.full(slots.index), keys * kD * 2);
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
  __device__ void load_tile(const CUtensorMap& map, const Item& item, int first) {
    load_box(map, item, open_slot(Tile::kKeys), Tile::kKeys, first);
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
    int before = 0;  // first key of the tile whose values are next
    while (true) {
      const Item& next = next_item();
      load_queries(next);
      const int last = before;  // of the item before
      KeyCursor<kD, kSchedule> keys(params.scratch, next);
      if (next.rows > 0) {
        if constexpr (Tile::kHasSmall) {
          load_small(params.key_small, next, keys.tiles.edge(next));
        } else {
          before = keys.next(next);
          load_tile(params.key, next, before);
        }
      }
      if (item != nullptr) load_tile(params.value, *item, last);
      if (next.rows == 0) return;
      item = &next;
      fetch();
#pragma unroll 1
      for (int t = Tile::kHasSmall ? 0 : 1; t < keys.tiles.count; ++t) {
        const int first = keys.next(next);
        load_tile(params.key, next, first);
        if (Tile::kHasSmall && t == 0) {
          if constexpr (Tile::kHasSmall)
            load_small(params.value_small, next, keys.tiles.edge(next));
        } else {
          load_tile(params.value, next, before);
        }
        before = first;
      }
    }
  }
};

}  // namespace trianglemix

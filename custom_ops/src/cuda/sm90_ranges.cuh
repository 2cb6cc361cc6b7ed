// The Hopper kernel's consumers of items that visit key ranges: sinks and a window. Items overlap:
// an item's small tile is scored beside the last values of the item before.
#pragma once

#include "sm90_consumer.cuh"

namespace trianglemix {

template <typename T, int kD>
struct RangeConsumer : Consumer<T, kD, Schedule::kRanges> {
  using Base = Consumer<T, kD, Schedule::kRanges>;
  using Tile = typename Base::Tile;
  using Tiles = typename Base::Tiles;
  using Work = typename Base::Work;
  using Base::after, Base::behind, Base::cap, Base::column, Base::give_queries, Base::is_active;
  using Base::Base;
  using Base::last_query, Base::mask_of, Base::open_item;
  using Base::params, Base::queries, Base::release, Base::release_queries, Base::shared;
  using Base::skip_slot, Base::slots, Base::state, Base::step, Base::store, Base::strip;
  using Base::take_slot, Base::weigh_tile, Base::work_of;

  // Beside what is under way in any item, scores and weights of a small tile.
  struct Fragments : Base::Fragments {
    float s_small[Tile::kSmall / 2];
    uint32_t p_small[Tile::kSmall / 4];
  };

  __device__ __forceinline__ void clear_dead_small(uint32_t v, const Item& item, int edge) {
    constexpr int kLine = Tile::kSwizzle, kStride = Tile::kSmall * Tile::kSwizzle;
    clear_rows<kLine>(v, kStride, Tile::kSlabs, Tile::kSinks, item.end - item.first_valid, 0);
    clear_rows<kLine>(v + Tile::kSinks * kLine, kStride, Tile::kSlabs, Tile::kEdge, item.end - edge,
                      item.first_valid - edge);
    fence_async_shared();
    named_barrier_sync(1 + strip, 128);
  }
  __device__ __forceinline__ void weigh_small(float (&s)[Tile::kSmall / 2], const Item& item,
                                              int edge) {
    cap(s);
    const int sinks = item.sinks - 1 - column;
    mask_causal<0, Tile::kSinks / 2>(s, {sinks, sinks});
    mask_columns<Tile::kSinks / 2, Tile::kSmall / 2>(s, mask_of(item, edge));
    state.find_peaks(s, params.plan.exponent);
    state.weigh(s, params.plan.exponent, 0);
    state.weigh(s, params.plan.exponent, 1);
  }

  // Clears what holds no key in the values of the item's small tile, two slots on.
  __device__ __forceinline__ void clear_ahead(const Item& item) {
    const Tiles tiles(item);
    if (!Base::has_dead(item, tiles)) return;
    Ring<Tile::kSlots> ahead = slots;
    ahead.advance();
    mbarrier_wait(shared.full(ahead.index), ahead.parity);
    clear_dead_small(shared.slot(ahead.index), item, tiles.edge(item));
  }

  // Begins the softmax of an item with the scores of its small tile, from slot k.
  __device__ __forceinline__ void open_weights(Fragments& f, const Item& item, int k) {
    pin(f.s_small);
    release(shared.empty(k));
    state.reset();
    weigh_small(f.s_small, item, Tiles(item).edge(item));
    pack_weights<T>(f.p_small, f.s_small);
  }

  // An item whose small tile is weighed and whose first whole tile's scores are under way, up to
  // but not including the values of its last tile.
  __device__ __forceinline__ void pass_tiles(Fragments& f, const Work& work) {
    if (is_active(work.item)) {
      const int v = take_slot();
      wgmma_fence();
      Base::template issue_values<Tile::kSmall>(f.o, f.p_small, v, false);
      weigh_tile(f, work, 0);
      give_queries();
      for (int t = 1; t < work.count; ++t) step(f, work, t, true, [] {});
    } else {
      wgmma_wait<0>();
      pin(f.s);
      release(shared.empty(behind(1)));
      for (int t = 1; t < 2 * work.count; ++t) skip_slot();
      if (Tile::kQueries == 1) release_queries(0);
      give_queries();
    }
  }

  // Sets out for the values of the item's last tile, beside the next item's scores of its small
  // tile (without a next item, of whatever lies there); the values' slot.
  __device__ __forceinline__ int issue_last(Fragments& f, const Work& work, const Item& next,
                                            bool more) {
    if (more) take_slot();
    const int v = take_slot();
    if (work.dead) Base::clear_dead_tile(shared.slot(v), work.item, work.first(work.count - 1));
    if (more) clear_ahead(next);
    wgmma_fence();
    Base::template issue_scores<Tile::kSmall>(f.s_small, queries.index, behind(2));
    Base::template issue_values<Tile::kKeys>(f.o, f.p, v, true);
    return v;
  }

  __device__ void run() {
    Fragments f;
    const Item* item = &open_item(shared.items);
    if (item->rows == 0) return;
    take_slot();
    clear_ahead(*item);
    take_slot();
    wgmma_fence();
    Base::template issue_scores<Tile::kSmall>(f.s_small, queries.index, behind(2));
    Base::template issue_scores<Tile::kKeys>(f.s, queries.index, behind(1));
    wgmma_wait<1>();
    open_weights(f, *item, behind(2));
    while (true) {
      const Work work = work_of(*item);
      queries.advance();
      pass_tiles(f, work);
      const Item* next = &open_item(after(item));
      const bool more = uniform(next->rows > 0);
      const int v = issue_last(f, work, *next, more);
      OnlineSoftmax ended = state;
      if (item->splits > 1) {  // merging calls functions: nothing is under way then
        wgmma_wait<0>();
        pin(f.o);
        release(shared.empty(v));
        Base::store_share(f, ended, *item);
      }
      if (!more) break;
      take_slot();
      wgmma_fence();
      Base::template issue_scores<Tile::kKeys>(f.s, queries.index, behind(1));
      wgmma_wait<2>();
      open_weights(f, *next, behind(3));
      wgmma_wait<1>();
      if (item->splits == 1) {
        pin(f.o);
        release(shared.empty(v));
        store(f, ended, *item, last_query());
      }
      item = next;
    }
    wgmma_wait<0>();
    pin(f.o);
    if (item->splits == 1) store(f, state, *item, last_query());
    bulk_read_wait();
  }
};

}  // namespace trianglemix

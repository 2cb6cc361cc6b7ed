// The Hopper kernel's consumers of items that visit key blocks. Items overlap: an item's first tile
// is scored beside the last values of the item before, whose rows are stored beside the scores of
// the second.
#pragma once

#include "sm90_consumer.cuh"

namespace trianglemix {

template <typename T, int kD>
struct BlockConsumer : Consumer<T, kD, Schedule::kBlocks> {
  using Base = Consumer<T, kD, Schedule::kBlocks>;
  using Tile = typename Base::Tile;
  using Work = typename Base::Work;
  using Fragments = typename Base::Fragments;
  using Base::after, Base::behind, Base::give_queries, Base::is_active, Base::mask_tile;
  using Base::Base;
  using Base::open_item, Base::params, Base::queries, Base::release, Base::release_queries;
  using Base::shared, Base::skip_slot, Base::slots, Base::state, Base::step, Base::take_slot;
  using Base::work_of;

  // An item whose tiles are done; its sums are in registers until it is stored.
  struct Ended {
    const Item* item = nullptr;
    OnlineSoftmax state;
  };

  // Weighs an item's first tile, whose scores are under way from slot k. So are the last values of
  // the item before, from slot v (none where it is negative).
  __device__ __forceinline__ void open_tile(Fragments& f, const Work& work, int k, int v) {
    wgmma_wait<1>();
    pin(f.s);
    release(shared.empty(k));
    if (Tile::kQueries == 1 && work.count == 1) release_queries(0);
    state.reset();
    if (work.plain.to <= 0 || work.plain.from > 0) mask_tile(f.s, work, 0);
    state.find_peaks(f.s, params.plan.exponent);
    state.weigh(f.s, params.plan.exponent, 0);
    state.settle(0);
    wgmma_wait<0>();
    pin(f.o);
    if (v >= 0) release(shared.empty(v));
    pack_row<T>(f.p, f.s, 0);
    state.weigh(f.s, params.plan.exponent, 1);
    pack_row<T>(f.p, f.s, 1);
  }

  __device__ __forceinline__ void store(Fragments& f, const Ended& ended) {
    // The item at hand has the other place of queries.
    if (ended.item != nullptr) Base::store(f, ended.state, *ended.item, queries.index);
  }

  // From an item's first tile, weighed, up to but not including the values of its last one.
  __device__ __forceinline__ void pass_tiles(Fragments& f, const Work& work, const Ended& ended) {
    const bool active = is_active(work.item);
    if (active && work.count > 1) {
      step(f, work, 1, false, [&] { store(f, ended); });
    } else {
      store(f, ended);
    }
    give_queries();
    if (active) {
      for (int t = 2; t < work.count; ++t) step(f, work, t, true, [] {});
    } else {
      for (int t = 2; t < 2 * work.count; ++t) skip_slot();
      if (Tile::kQueries == 1 && work.count > 1) release_queries(0);
    }
  }

  __device__ void run() {
    Fragments f;
    Ended ended;
    const Item* item = &open_item(shared.items);
    if (item->rows == 0) return;
    int k = take_slot(), v = -1;
    wgmma_fence();
    Base::template issue_scores<Tile::kKeys>(f.s, queries.index, k);
    wgmma_commit();  // in the place of values
    while (true) {
      const Work work = work_of(*item);
      queries.advance();
      open_tile(f, work, k, v);
      if (ended.item != nullptr && ended.item->splits > 1) {  // merging calls functions
        Base::store_share(f, ended.state, *ended.item);
        ended.item = nullptr;
      }
      pass_tiles(f, work, ended);
      const Item* next = &open_item(after(item));
      const bool more = uniform(next->rows > 0);
      if (more) k = take_slot();
      v = take_slot();
      if (work.dead) Base::clear_dead_tile(shared.slot(v), *item, work.first(work.count - 1));
      wgmma_fence();
      Base::template issue_scores<Tile::kKeys>(f.s, queries.index, k);
      Base::template issue_values<Tile::kKeys>(f.o, f.p, v, work.count > 1);
      ended.item = item;
      ended.state = state;
      if (!more) break;
      item = next;
    }
    wgmma_wait<0>();
    pin(f.o);
    if (ended.item->splits > 1) {
      Base::store_share(f, ended.state, *ended.item);
    } else {
      Base::store(f, ended.state, *ended.item, Base::last_query());
    }
    bulk_read_wait();
  }
};

}  // namespace trianglemix

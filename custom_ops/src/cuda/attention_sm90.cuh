// Attention on Hopper: warpgroup matrix products fed by the bulk copy engine, persistent blocks.
//
// A block is one producer warp and three (D = 256: two) consumer warpgroups of 64 tile rows each.
// The producer draws work items from a counter and streams Q, K and V tiles through shared memory.
// A warpgroup has the scores of tile t and the values of tile t - 1 in flight together, across items
// too, and while it weighs its scores the other warpgroups' products fill the tensor cores. An item
// begins with a small tile, 16 sinks and one tile of keys at the window's edge; then come whole tiles
// in ascending order, of which only the first and the last few need a mask.
// Cost per item: rows * (window + positions + at most kKeys + 16) * 4 * D operations.
#pragma once

#include <cuda.h>

#include "launch.h"
#include "partial.cuh"
#include "wgmma.cuh"

namespace trianglemix {

struct Sm90Params {
  CUtensorMap query, key, value, key_small, value_small;
  Plan plan;
  Lengths lengths;
  Scratch scratch;
  void* output;
};

template <int kD>
struct Sm90Tile {
  static constexpr int kRows = sm90_tile_rows(kD), kStrips = kRows / 64;  // a warpgroup each
  static constexpr int kKeys = sm90_key_tile(kD);  // keys of a whole tile
  static constexpr int kSinks = 16, kEdge = sm90_key_edge(kD), kSmall = kSinks + kEdge;
  static constexpr int kSwizzle = kD % 64 == 0 ? 128 : 64;  // bytes of a slab's row
  static constexpr int kSlabColumns = kSwizzle / 2, kSlabs = kD / kSlabColumns;
  static constexpr int kQueries = kD > 128 ? 1 : 2, kItems = 4;
  static constexpr int kQueryBytes = kRows * kD * 2, kSlotBytes = max_of(kKeys, kSmall) * kD * 2;
  static constexpr int kSlots = min_of(8, (225 * 1024 - kQueries * kQueryBytes) / kSlotBytes);
  static constexpr int kThreads = 128 * (1 + kStrips);
  static constexpr int kProducerRegisters = kStrips == 3 ? 32 : 56;
  static constexpr int kConsumerRegisters = kStrips == 3 ? 160 : 224;
  static constexpr int kShared =
      1024 + kQueries * kQueryBytes + kSlots * kSlotBytes + 16 * (kSlots + kQueries) +
      kItems * static_cast<int>(sizeof(Item)) + 16;
};

// Addresses in shared memory.
template <int kD>
struct Sm90Shared {
  using Tile = Sm90Tile<kD>;
  uint32_t base;
  Item* items;
  int* flags;

  __device__ explicit Sm90Shared(char* raw) {
    char* aligned = raw + ((1024 - shared_address(raw) % 1024) % 1024);
    base = shared_address(aligned);
    char* tail = aligned + Tile::kQueries * Tile::kQueryBytes + Tile::kSlots * Tile::kSlotBytes +
                 16 * (Tile::kSlots + Tile::kQueries);
    items = reinterpret_cast<Item*>(tail);
    flags = reinterpret_cast<int*>(tail + Tile::kItems * sizeof(Item));
  }
  __device__ uint32_t query(int i) const { return base + i * Tile::kQueryBytes; }
  __device__ uint32_t slot(int i) const {
    return base + Tile::kQueries * Tile::kQueryBytes + i * Tile::kSlotBytes;
  }
  __device__ uint32_t full(int i) const { return slot(Tile::kSlots) + 8 * i; }
  __device__ uint32_t empty(int i) const { return full(Tile::kSlots + i); }
  __device__ uint32_t query_full(int i) const { return full(2 * Tile::kSlots + i); }
  __device__ uint32_t query_empty(int i) const {
    return full(2 * Tile::kSlots + Tile::kQueries + i);
  }
};

// Position in a ring of `kSize` buffers; `parity` flips with every round.
template <int kSize>
struct Ring {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kSize) index = 0, parity ^= 1;
  }
};

// Key tiles of one item: `sink_tiles` whole tiles of sinks beyond 16, then those of the range.
template <int kD>
struct KeyTiles {
  using Tile = Sm90Tile<kD>;
  int sink_tiles, count;

  __device__ __forceinline__ explicit KeyTiles(const Item& item) {
    sink_tiles = ceil_div(max_of(0, item.sinks - Tile::kSinks), Tile::kKeys);
    count = sink_tiles + max_of(1, ceil_div(item.high - item.low - Tile::kEdge, Tile::kKeys));
  }
  // First key of whole tile t, and of the small tile's edge part.
  __device__ __forceinline__ int first(const Item& item, int t) const {
    return t < sink_tiles ? item.first_valid + Tile::kSinks + t * Tile::kKeys
                          : item.high - (count - t) * Tile::kKeys;
  }
  __device__ __forceinline__ int edge(const Item& item) const {
    return item.high - (count - sink_tiles) * Tile::kKeys - Tile::kEdge;
  }
};

// ---- producer: one thread ----

template <int kD>
struct Producer {
  using Tile = Sm90Tile<kD>;
  const Sm90Params& params;
  const Sm90Shared<kD>& shared;
  Ring<Tile::kSlots> slots;
  Ring<Tile::kQueries> queries;
  int number, produced = 0;
  Item ahead;  // the item after the one being loaded, fetched while that one's tiles are

  __device__ Producer(const Sm90Params& params, const Sm90Shared<kD>& shared)
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
    mbarrier_wait(shared.query_empty(queries.index), queries.parity ^ 1);
    const uint32_t barrier = shared.query_full(queries.index);
    if (item.rows == 0) return mbarrier_arrive(barrier);
    mbarrier_expect(barrier, params.plan.positions * params.plan.pack * kD * 2);
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      tma_load_4d(shared.query(queries.index) + slab * Tile::kRows * Tile::kSwizzle, &params.query,
                  barrier, slab * Tile::kSlabColumns, item.group * params.plan.pack, item.row,
                  item.b);
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

  // Tiles in the order in which the consumers take them.
  __device__ void run() {
    const Item* item = nullptr;
    fetch();
    while (true) {
      const Item& next = next_item();
      load_queries(next);
      if (next.rows > 0) {
        load_small(params.key_small, next, KeyTiles<kD>(next).edge(next));
      }
      if (item != nullptr) {
        const KeyTiles<kD> tiles(*item);
        load_tile(params.value, *item, tiles.first(*item, tiles.count - 1));
      }
      if (next.rows == 0) return;
      item = &next;
      fetch();
      const KeyTiles<kD> tiles(next);
#pragma unroll 1
      for (int t = 0; t < tiles.count; ++t) {
        load_tile(params.key, next, tiles.first(next, t));
        if (t == 0) {
          load_small(params.value_small, next, tiles.edge(next));
        } else {
          load_tile(params.value, next, tiles.first(next, t - 1));
        }
      }
    }
  }
};

// ---- consumers: a warpgroup each ----

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
  const int column;     // the lane's first column in each 8
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
          s, matrix_descriptor<Tile::kSwizzle>(q + slab * Tile::kRows * Tile::kSwizzle + inside, 16),
          matrix_descriptor<Tile::kSwizzle>(k + slab * kN * Tile::kSwizzle + inside, 16), step > 0);
    }
    wgmma_commit();
  }

  template <int kN>
  __device__ __forceinline__ void issue_values(float (&o)[kD / 2], const uint32_t (&p)[kN / 4],
                                               uint32_t v, bool add) {
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      Wgmma<T>::values(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                       matrix_descriptor<Tile::kSwizzle>(v + step * 16 * Tile::kSwizzle,
                                                         kN * Tile::kSwizzle),
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
    clear_rows<kLine>(v + Tile::kSinks * kLine, kStride, Tile::kSlabs, Tile::kEdge,
                      item.end - edge, item.first_valid - edge);
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
    if constexpr (kFirst) clear_dead_small(shared.slot(v), item, tiles.edge(item));
    else clear_dead_tile(shared.slot(v), item, tiles.first(item, t - 1));
    wgmma_fence();
    issue_scores<Tile::kKeys>(s, shared.query(query) + 64 * strip * Tile::kSwizzle, shared.slot(k));
    if constexpr (kFirst) issue_values<Tile::kSmall>(o, p_small, shared.slot(v), false);
    else issue_values<Tile::kKeys>(o, p, shared.slot(v), true);
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
  __device__ __forceinline__ void store_rows(const float (&o)[kD / 2], const Item& item, int query) {
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
        *reinterpret_cast<uint4*>(output + tile_row_offset(params.plan, tile_row) + 8 * piece) =
            load_shared(address(r, piece));
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

  __device__ void run() {
    float o[kD / 2], s_small[Tile::kSmall / 2];
    uint32_t p[Tile::kKeys / 4], p_small[Tile::kSmall / 4];
    int taken = 0, k = 0;
    const Item* item = &open_item(taken);
    if (item->rows > 0) {
      k = slots.index;
      mbarrier_wait(shared.full(k), slots.parity);
      slots.advance();
      wgmma_fence();
      issue_scores<Tile::kSmall>(
          s_small, shared.query(queries.index) + 64 * strip * Tile::kSwizzle, shared.slot(k));
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
      k = slots.index;
      if (next->rows > 0) {  // else the scores below are of whatever lies there, and unused
        mbarrier_wait(shared.full(k), slots.parity);
        slots.advance();
      }
      const int v = slots.index;
      mbarrier_wait(shared.full(v), slots.parity);
      slots.advance();
      clear_dead_tile(shared.slot(v), *item, tiles.first(*item, tiles.count - 1));
      wgmma_fence();
      issue_scores<Tile::kSmall>(
          s_small, shared.query(queries.index) + 64 * strip * Tile::kSwizzle, shared.slot(k));
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

template <typename T, int kD>
__global__ void __launch_bounds__(Sm90Tile<kD>::kThreads, 1)
    attention_sm90(const __grid_constant__ Sm90Params params) {
  using Tile = Sm90Tile<kD>;
  extern __shared__ char raw[];
  const Sm90Shared<kD> shared(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      mbarrier_init(shared.full(i), 1);
      mbarrier_init(shared.empty(i), 4 * Tile::kStrips);  // consumer warps
    }
    for (int i = 0; i < Tile::kQueries; ++i) {
      mbarrier_init(shared.query_full(i), 1);
      mbarrier_init(shared.query_empty(i), 4 * Tile::kStrips);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) Producer<kD>(params, shared).run();
  } else {
    registers_take<Tile::kConsumerRegisters>();
    Consumer<T, kD>(params, shared).run();
  }
}

}  // namespace trianglemix

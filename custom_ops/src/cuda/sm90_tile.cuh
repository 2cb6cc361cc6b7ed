// The Hopper kernel's parameters, its place in shared memory, and the key tiles of an item.
#pragma once

#include <cuda.h>

#include "launch.h"
#include "partial.cuh"
#include "sm90_ring.cuh"

namespace trianglemix {

struct Sm90Params {
  CUtensorMap query, key, value, key_small, value_small, out;
  bool bulk_out;  // whether the rows of a warpgroup are a box of `out`
  Plan plan;
  Lengths lengths;
  Scratch scratch;
  void* output;
};

// What an item's keys are: a sliding window and sinks, or whole blocks from a bit mask.
enum class Schedule { kRanges, kBlocks };

template <int kD, Schedule kSchedule>
struct Sm90Tile {
  static constexpr int kRows = sm90_tile_rows, kStrips = kRows / 64;  // a warpgroup each
  static constexpr bool kHasSmall = kSchedule == Schedule::kRanges;
  static constexpr int kKeys = kHasSmall ? sm90_key_tile(kD) : sm90_block_tile(kD);
  static constexpr int kSinks = 16, kEdge = sm90_key_edge(kD), kSmall = kSinks + kEdge;
  static constexpr int kSwizzle = kD % 64 == 0 ? 128 : 64;  // bytes of a slab's row
  static constexpr int kSlabColumns = kSwizzle / 2, kSlabs = kD / kSlabColumns;
  static constexpr int kQueries = kD > 128 ? 1 : 2, kItems = 4;
  static constexpr int kSlotKeys = kHasSmall ? Larger(kKeys, kSmall) : kKeys;
  static constexpr int kQueryBytes = kRows * kD * 2, kSlotBytes = kSlotKeys * kD * 2;
  static constexpr int kSlots = Smaller(8, (225 * 1024 - kQueries * kQueryBytes) / kSlotBytes);
  static constexpr int kThreads = 128 * (1 + kStrips);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr int kShared = 1024 + kQueries * kQueryBytes + kSlots * kSlotBytes +
                                 16 * (kSlots + kQueries) +
                                 kItems * static_cast<int>(sizeof(Item)) + 16;
};

// Addresses in shared memory.
template <typename Tile>
struct Sm90Shared {
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

// The key tiles of an item, in the order in which they are visited.
template <int kD, Schedule kSchedule>
struct KeyTiles;

// Behind a small tile, 16 sinks and the range's edge: `sink_tiles` whole tiles of sinks beyond 16,
// then those of the range.
template <int kD>
struct KeyTiles<kD, Schedule::kRanges> {
  using Tile = Sm90Tile<kD, Schedule::kRanges>;
  int sink_tiles, count;

  __device__ __forceinline__ explicit KeyTiles(const Item& item) {
    sink_tiles = CeilDivide(Larger(0, item.sinks - Tile::kSinks), Tile::kKeys);
    count = sink_tiles + Larger(1, CeilDivide(item.high - item.low - Tile::kEdge, Tile::kKeys));
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

// The tiles of whole blocks, then the `count - diagonal` of the rows' own one.
template <int kD>
struct KeyTiles<kD, Schedule::kBlocks> {
  using Tile = Sm90Tile<kD, Schedule::kBlocks>;
  static constexpr int kOfBlock = kBlock / Tile::kKeys;
  int diagonal, count;

  __device__ __forceinline__ explicit KeyTiles(const Item& item) {
    diagonal = item.blocks * kOfBlock;
    count = diagonal + CeilDivide(item.high - item.low, Tile::kKeys);
  }
  // First key of tile t; only the bit mask knows that of a whole block, and what it is makes no
  // difference: all rows keep all of it.
  __device__ __forceinline__ int first(const Item& item, int t) const {
    return t < diagonal ? item.first_valid : item.low + (t - diagonal) * Tile::kKeys;
  }
};

// First keys of an item's tiles, one after the other.
template <int kD, Schedule kSchedule>
struct KeyCursor;

template <int kD>
struct KeyCursor<kD, Schedule::kRanges> {
  const KeyTiles<kD, Schedule::kRanges> tiles;
  int t = 0;

  __device__ __forceinline__ KeyCursor(const Scratch&, const Item& item) : tiles(item) {}
  __device__ __forceinline__ int next(const Item& item) { return tiles.first(item, t++); }
};

template <int kD>
struct KeyCursor<kD, Schedule::kBlocks> {
  using Tiles = KeyTiles<kD, Schedule::kBlocks>;
  const Tiles tiles;
  BlockCursor blocks;
  int first = 0, part = 0;

  __device__ __forceinline__ KeyCursor(const Scratch& scratch, const Item& item)
      : tiles(item), blocks(scratch.bits, scratch.words, item) {}
  __device__ __forceinline__ int next(const Item& item) {
    if (part % Tiles::kOfBlock == 0) first = item.first_valid + kBlock * blocks.next();
    return first + part++ % Tiles::kOfBlock * Tiles::Tile::kKeys;
  }
};

}  // namespace trianglemix

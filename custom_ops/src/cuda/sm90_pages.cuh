// Keys and values by pages on Hopper: a warp looks the pages of a tile up, each lane one, and then
// asks the copy engine for one after the other.
//
// A tile begins at a page's edge, or lies inside of one page: pages and tiles are powers of two.
// What no page holds, past the row's end, arrives as zeros. Cost: a box of shared memory a page and
// slab, where a tensor in one piece takes one a tile and slab. The copy engine takes a box of 16
// slots in about the time of one of 64, so pages of 16 double a call, and those of 64 or more cost
// nothing.
#pragma once

#include <type_traits>

#include "launch.h"
#include "ptx.cuh"

namespace trianglemix {

// How keys and values lie in memory.
enum class Layout { kWhole, kPages };

struct PageTable {
  const int32_t* table;  // [B, row_pages]
  int row_pages, size_bits;
};

inline PageTable page_table(const KeyPages& pages) {
  int bits = 0;
  while (int64_t{1} << bits < pages.size) ++bits;
  return {pages.table, static_cast<int>(pages.row_pages), bits};
}

template <typename Base>
struct PagedParams : Base {
  PageTable pages;
};
template <typename Base, Layout kLayout>
using ParamsOf = std::conditional_t<kLayout == Layout::kPages, PagedParams<Base>, Base>;

// The threads that load, the first of their block, and the one of them that does what is done once.
template <Layout kLayout>
constexpr int kLoaders = kLayout == Layout::kPages ? 32 : 1;
template <Layout kLayout>
__device__ __forceinline__ bool leads() {
  return kLoaders<kLayout> == 1 || threadIdx.x == 0;
}

// Where a tile of keys lies: its first slot, and of lane i the page of its i-th box.
struct PagedPlace {
  int first, page;
};

// The tile from slot `first` on, of a row whose keys end at `end`.
template <typename Tile>
__device__ __forceinline__ PagedPlace find_pages(const PageTable& pages, int b, int first,
                                                 int end) {
  constexpr int kNone = -1;  // outside of the pool: the copy engine fills in zeros
  const int box = Smaller(1 << pages.size_bits, Tile::kKeys);
  const int inside = static_cast<int>(threadIdx.x % 32) * box, slot = first + inside;
  if (inside >= Tile::kKeys || slot >= end) return {first, kNone};
  const int64_t row = static_cast<int64_t>(b) * pages.row_pages;
  return {first, __ldg(pages.table + row + (slot >> pages.size_bits))};
}

// Loads a tile to shared memory at `target`; all its bytes count at `barrier`. By a whole warp.
template <typename Tile>
__device__ __forceinline__ void load_pages(const PageTable& pages, const CUtensorMap& map,
                                           uint32_t target, uint32_t barrier, int head,
                                           const PagedPlace& place) {
  const int size = 1 << pages.size_bits, box = Smaller(size, Tile::kKeys);
  const int slot = place.first & (size - 1);
#pragma unroll 1
  for (int i = 0; i * box < Tile::kKeys; ++i) {
    const int page = __shfl_sync(0xffffffff, place.page, i);
    if (!leads<Layout::kPages>()) continue;
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      tma_load_4d(target + (slab * Tile::kKeys + i * box) * Tile::kSwizzle, &map, barrier,
                  slab * Tile::kSlabColumns, slot, head, page);
    }
  }
}

}  // namespace trianglemix

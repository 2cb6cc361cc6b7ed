// Which rows and keys each work item of the attention kernels covers (integer arithmetic only).
//
// The host knows sizes, not lengths: it makes a Plan with an upper bound on the items. The append
// kernel, which runs first, lists them with the lengths it finds on the device; items that these
// lengths leave empty have no rows and are passed over.
//
// A tile holds `positions` query positions times `pack` query heads that share one key/value head;
// tile row r is position r / pack, head r % pack. The new rows of one batch row are cut into
//   [0, dense)        streaming rows: sinks and a window
//   [dense, split)    dense rows, one work item per tile (dense mode, stale prompt lengths)
//   [split, rows)     dense rows, `splits` work items per tile, each with its share of the keys
// so that tiles start anew at each boundary and no tile mixes two kinds.
//
// That is the schedule of key ranges. In that of key blocks (block_sparse/) a tile's item names a
// row of a bit mask instead, whose set bits are the blocks that it visits.
#pragma once

#include "../problem.h"

#ifdef __CUDACC__
#define TM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TM_HOST_DEVICE inline
#endif

namespace trianglemix {

constexpr int kNoWindow = 1 << 30;  // wider than any buffer: lengths are below 2^30
constexpr int kMaxTokens = 1 << 29;

// What the host decides, from sizes alone.
struct Plan {
  int batch, length, capacity;          // B, S, T
  int heads, kv_heads;                  // H, G
  int head_size, value_head_size;       // D, Dv
  int tile_rows, pack, positions;       // pack * positions <= tile_rows
  int key_tile, key_rest;               // a share of split keys is key_tile * k + key_rest
  int groups;                           // H / pack; group g reads key head g * pack / (H / G)
  int sink, window, last;               // window == kNoWindow: dense mode
  int split_rows, split_tiles, splits;  // at most split_rows rows of a batch row are split
  int row_tiles;                        // upper bound of unsplit tiles per batch row and group
  int split_items, items;               // work items: the split ones come first
  int wave;                             // groups of a batch row whose tiles are taken together
  int pack_reciprocal;                  // row / pack == row * pack_reciprocal >> 16 in a tile
  float scale, softcap;
  float exponent;  // of 2 per unit of score, once capped
};

// One batch row, from the lengths on the device. An impossible length gives no rows at all.
struct RowRange {
  int start, rows, end;  // position of new row 0, rows that attend, L_b
  int dense, split;      // first dense row, first split row
  int first_valid;
  bool writes;  // whether the new tokens go to the cache
};

struct Lengths {
  const int32_t* seqlens_k;
  const int32_t* prompt_length;  // may be null
  const int32_t* first_valid;    // may be null
};

TM_HOST_DEVICE RowRange row_range(const Plan& plan, const Lengths& lengths, int b) {
  RowRange r;
  const int64_t end = static_cast<int64_t>(lengths.seqlens_k[b]) + 1;
  r.writes = end >= 0 && end <= plan.capacity;
  r.end = r.writes ? static_cast<int>(end) : 0;
  r.start = Larger(0, r.end - plan.length);
  r.rows = Smaller(plan.length, r.end - r.start);
  const int64_t prompt = lengths.prompt_length ? lengths.prompt_length[b] : r.end;
  const int64_t dense = plan.window == kNoWindow ? 0 : prompt - plan.last - r.start;
  r.dense = static_cast<int>(Clamp(dense, 0, r.rows));
  r.split = Larger(r.dense, r.rows - plan.split_rows);
  const int64_t first = lengths.first_valid ? lengths.first_valid[b] : 0;
  r.first_valid = static_cast<int>(Clamp(first, 0, plan.capacity));
  return r;
}

// One tile of rows and its keys: the sinks first_valid .. first_valid + sinks (all below `low`),
// and the range low .. high, of which row i keeps j <= i and (i - j < window or j < sink_end).
// In the schedule of key blocks its keys are `blocks` whole ones, the set bits of row `bits` of a
// mask behind the first `skipped`, and then, where it is not empty, the range low .. high of the
// rows' own block, of which row i keeps j <= i.
struct alignas(16) Item {
  int b, group, kv_head;
  int row, rows;  // first new row, number of positions
  int position;   // position of the first row
  int low, high;
  union {
    int sinks, blocks;
  };
  union {
    int sink_end, bits;
  };
  union {
    int window, skipped;
  };
  int first_valid, end;
  int slot, split, splits;  // splits > 1: partial result number `slot + split` of `splits`
};

TM_HOST_DEVICE void set_rows(Item& item, const RowRange& range, const Plan& plan, int row,
                             int stop) {
  item.row = row;
  item.rows = Smaller(plan.positions, stop - row);
  item.position = range.start + row;
  item.first_valid = range.first_valid;
  item.end = range.end;
  item.low = range.first_valid;
  item.high = item.position + item.rows;
  item.sinks = 0;
  item.sink_end =
      static_cast<int>(Clamp(static_cast<int64_t>(range.first_valid) + plan.sink, 0, kMaxTokens));
  item.window = kNoWindow;
  item.slot = item.split = 0;
  item.splits = 1;
}

TM_HOST_DEVICE void set_window(Item& item, const Plan& plan) {
  item.window = plan.window;
  item.low = Larger(item.first_valid, item.position - plan.window + 1);
  item.sinks = Larger(0, Smaller(plan.sink, item.low - item.first_valid));
}

TM_HOST_DEVICE bool set_split(Item& item, const Plan& plan, int tile) {
  const int keys = Larger(0, item.high - item.low);
  const int whole = CeilDivide(CeilDivide(keys, plan.splits) - plan.key_rest, plan.key_tile);
  const int share = Larger(1, whole) * plan.key_tile + plan.key_rest;
  item.splits = Larger(1, CeilDivide(keys, share));
  if (item.split >= item.splits) return false;
  item.slot = ((item.b * plan.groups + item.group) * plan.split_tiles + tile) * plan.splits;
  item.high -= item.split * share;
  item.low = Larger(item.low, item.high - share);
  return true;
}

// Fills `item` for work item `number`; false if these lengths leave it empty.
TM_HOST_DEVICE bool find_item(Item& item, const Plan& plan, const Lengths& lengths, int number) {
  const bool is_split = number < plan.split_items;
  int tile, split = 0, row_group;  // row_group: group of which batch row
  if (is_split) {
    const int rest = number / plan.groups;
    split = rest % plan.splits;
    row_group = rest / plan.splits % plan.batch * plan.groups + number % plan.groups;
    tile = rest / plan.splits / plan.batch;
  } else {
    const int rest = number - plan.split_items;
    const int first = rest / (plan.wave * plan.row_tiles) * plan.wave;
    const int together = Smaller(plan.wave, plan.batch * plan.groups - first);
    const int inside = rest - first * plan.row_tiles;
    row_group = first + inside % together;
    tile = inside / together;
  }
  item.group = row_group % plan.groups;
  item.b = row_group / plan.groups;
  item.kv_head = item.group * plan.pack / (plan.heads / plan.kv_heads);
  const RowRange range = row_range(plan, lengths, item.b);
  if (is_split) {
    const int row = range.split + tile * plan.positions;
    if (row >= range.rows) return false;
    set_rows(item, range, plan, row, range.rows);
    item.split = split;
    return set_split(item, plan, tile);
  }
  tile = plan.row_tiles - 1 - tile;  // the longest dense rows first
  const int streaming_tiles = CeilDivide(range.dense, plan.positions);
  if (tile < streaming_tiles) {
    set_rows(item, range, plan, tile * plan.positions, range.dense);
    set_window(item, plan);
    return true;
  }
  const int row = range.dense + (tile - streaming_tiles) * plan.positions;
  if (row >= range.split) return false;
  set_rows(item, range, plan, row, range.split);
  return true;
}

}  // namespace trianglemix

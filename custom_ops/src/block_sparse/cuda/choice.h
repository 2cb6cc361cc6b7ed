// The choice of blocks on a GPU: its work, its scratch, and what it leaves for attention.
//
// The host knows sizes, not lengths: it makes a plan with upper bounds, and the kernels find what
// there is with the lengths on the device. A unit is a tile of one head: eight sampled rows. An
// item is `units` units of one key head, so that each load of keys serves all their rows; blocks
// go over the items in turn, the longest first and every other round backwards. The sums of a
// unit's sampled rows over each block go to the scratch of the block (they stay in the L2 cache),
// from which it then chooses.
#pragma once

#include "../../cuda/launch.h"
#include "../../cuda/partial.cuh"
#include "../problem.h"
#include "../rule.h"

namespace trianglemix {

// All of a call's scratch stays below this up to 128K tokens; fewer blocks choose at once where
// the sums of all of them would not.
constexpr size_t kChoiceScratch = size_t{64} << 20;

struct ChoicePlan {
  int batch, length, capacity;     // B, S, T
  int heads, kv_heads, group;      // H, G, H / G
  int head_size, value_head_size;  // D, Dv
  BlockRule rule;
  int row_tiles;                // of a batch row, at most so many tiles hold new rows
  int words;                    // of a tile's bits
  int units, row_items, items;  // units of an item; items of a batch row and key head, of all
  int blocks;                   // thread blocks that choose at once
  int tile_items, positions;    // parts of a tile, rows of a part
  int splits;                   // of a part, at most: attention's items of it
  int wave;                     // key heads whose tiles it takes together
  float scale, softcap, exponent;
};

struct ChoiceScratch {
  uint32_t* bits;  // [row_tiles * B * H, words]
  char* sums;      // [blocks, units, 32 * words, 8]: float, or bfloat16 of 16-bit tensors
};

struct ChoiceParams {
  ChoicePlan plan;
  ChoiceScratch scratch;
  Item* items;  // attention's, [row_tiles * B * H * tile_items * splits]
  Lengths lengths;
  const void *query, *key;  // [B, S, H*D], [B, G, T, D]
  void* output;
};

ChoicePlan make_choice_plan(const BlockSparseProblem& problem, Kernel kernel, const Plan& attention,
                            const Device& device);
size_t choice_bytes(const ChoicePlan& plan, Kernel kernel);
ChoiceScratch choice_scratch_at(const ChoicePlan& plan, Kernel kernel, void* memory);

// Each enqueues one launch and returns its error.
cudaError_t launch_choice_sm90(const BlockSparseProblem& problem, const ChoiceParams& params,
                               cudaStream_t stream);
cudaError_t launch_choice_sm90_pages(const BlockSparseProblem& problem, const ChoiceParams& params,
                                     cudaStream_t stream);
cudaError_t launch_choice_sm80(const BlockSparseProblem& problem, const ChoiceParams& params,
                               cudaStream_t stream);
cudaError_t launch_choice_float32(const ChoiceParams& params, cudaStream_t stream);
// Writes the problem's block_mask; with null bits, that of the dense mode.
cudaError_t launch_block_mask(const BlockSparseProblem& problem, const ChoiceParams& params,
                              cudaStream_t stream);

constexpr int kTilesAhead = 2;
constexpr int kLeastShare = 8;  // blocks: merging costs, too

// Sampled rows of an item: on Hopper at most these, or 128 or 64 where there are few; on any other
// GPU; in float32.
constexpr int choice_most_rows_sm90(int head_size) { return head_size > 128 ? 128 : 192; }
constexpr int choice_rows_sm80(int head_size) { return head_size > 128 ? 64 : 128; }
constexpr int choice_rows_float32 = 32;

// ---- integers of the device ----

TM_HOST_DEVICE TiledRow tiled_row(const ChoicePlan& plan, const Lengths& lengths, int b) {
  int64_t end = static_cast<int64_t>(lengths.seqlens_k[b]) + 1;
  if (end < 0 || end > plan.capacity) end = 0;
  const int64_t prompt = lengths.prompt_length ? lengths.prompt_length[b] : end;
  const int64_t first = lengths.first_valid ? lengths.first_valid[b] : 0;
  return DescribeTiles(plan.rule, plan.length, end, prompt, Clamp(first, 0, end));
}

// Where the bits of a tile of a head lie, and attention's items in their order. `nth` counts the
// tiles of the batch row that hold new rows. The last tiles of all heads come first: they are
// dense, and take longest. Then come `wave` key heads together, as many as the L2 cache holds the
// keys and values of, the last tiles first.
TM_HOST_DEVICE int tile_number(const ChoicePlan& plan, int b, int head, int nth) {
  const int level = plan.row_tiles - 1 - nth, ahead = Smaller(kTilesAhead, plan.row_tiles);
  if (level < ahead) return (level * plan.batch + b) * plan.heads + head;
  const int key_heads = plan.batch * plan.kv_heads;
  const int key_head = b * plan.kv_heads + head / plan.group;
  const int first = key_head / plan.wave * plan.wave;  // of the wave
  const int size = Smaller(plan.wave, key_heads - first);
  const int before = ahead * key_heads + (plan.row_tiles - ahead) * first;
  return (before + (level - ahead) * size + key_head - first) * plan.group + head % plan.group;
}

// The units of work item `number`.
struct ChoiceItem {
  int b, kv_head;
  int first, count;  // units, counted from the first of the batch row's sparse tiles
  int sparse_begin, sampled_end, first_valid, start, begin;

  // Of unit u, 0 <= u < count.
  TM_HOST_DEVICE int tile(const ChoicePlan& plan, int u) const {
    return sparse_begin + (first + u) / plan.group;
  }
  TM_HOST_DEVICE int head(const ChoicePlan& plan, int u) const {
    return kv_head * plan.group + (first + u) % plan.group;
  }
  TM_HOST_DEVICE int last_tile(const ChoicePlan& plan) const { return tile(plan, count - 1); }
};

TM_HOST_DEVICE ChoiceItem choice_item(const ChoicePlan& plan, const Lengths& lengths, int number) {
  ChoiceItem item;
  item.kv_head = number % plan.kv_heads;
  number /= plan.kv_heads;
  item.b = number % plan.batch;
  const TiledRow row = tiled_row(plan, lengths, item.b);
  item.first = (plan.row_items - 1 - number / plan.batch) * plan.units;
  const int units = static_cast<int>(row.sparse_end - row.sparse_begin) * plan.group;
  item.count = Clamp(units - item.first, 0, plan.units);
  item.sparse_begin = static_cast<int>(row.sparse_begin);
  item.sampled_end = static_cast<int>(row.sampled_end);
  item.first_valid = static_cast<int>(row.first_valid);
  item.start = static_cast<int>(row.start);
  item.begin = static_cast<int>(row.begin);
  return item;
}

// The work item of a thread block's round, or one past the last.
TM_HOST_DEVICE int choice_number(const ChoicePlan& plan, int block, int round) {
  const int place = round % 2 ? plan.blocks - 1 - block : block;
  return Smaller(round * plan.blocks + place, plan.items);
}

// Attention's items of a part of a tile that keeps `kept` blocks, its own among them: shares of
// those, in turn. Where there are fewer shares, none of a tile that there is not, the others have
// no rows.
TM_HOST_DEVICE Item block_item(const ChoicePlan& plan, const TiledRow& row, int b, int head,
                               int tile, int kept, int number) {
  const int part = number / plan.splits % plan.tile_items;
  const int first = static_cast<int>(row.first_slot(tile));
  const int from = Larger(first + part * plan.positions, static_cast<int>(row.start));
  const int to = Smaller(first + (part + 1) * plan.positions, static_cast<int>(row.end));
  const int share = Larger(kLeastShare, CeilDivide(kept, plan.splits));
  Item item{};
  item.b = b;
  item.group = head;
  item.kv_head = head / plan.group;
  item.row = from - static_cast<int>(row.start);
  item.position = from;
  item.bits = number / (plan.splits * plan.tile_items);
  item.first_valid = static_cast<int>(row.first_valid);
  item.end = static_cast<int>(row.end);
  item.split = number % plan.splits;
  item.splits = CeilDivide(kept, share);
  item.slot = number - item.split;
  item.low = item.high = item.first_valid;
  if (item.split >= item.splits || from >= to) return item;
  item.rows = to - from;
  item.skipped = item.split * share;
  item.blocks = Smaller(share, kept - item.skipped);
  if (item.split == item.splits - 1) {
    item.blocks -= 1;
    item.low = first;
    item.high = to;
  }
  return item;
}

}  // namespace trianglemix

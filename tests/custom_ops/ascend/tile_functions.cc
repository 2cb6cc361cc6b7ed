// The Ascend operator's tiles as C functions, for the tests.
#include <algorithm>
#include <iterator>

#include "../../../custom_ops/ascend/opp/op_host/triangle_attention_sizes.h"

namespace {

using triangle::BatchRow;
using triangle::KeyBlock;
using triangle::KeyRanges;
using triangle::TokenTile;

// Adds one to visits[token * slots + key] for every key that a token of the tile visits and keeps.
bool Visit(const TriangleAttentionTilingData& data, const BatchRow& row, const TokenTile& tile,
           int64_t* visits) {
  const KeyRanges keys = triangle::KeysOf(data, row, tile);
  int64_t seen = -1;
  for (int64_t index = 0; index < triangle::CountBlocks(keys); ++index) {
    const KeyBlock block = triangle::BlockAt(keys, index);
    if (block.count < 1 || block.count > triangle::kBlockKeys || block.first <= seen) return false;
    seen = block.first + block.count - 1;
    uint64_t any = 0;
    for (int64_t token = tile.firstToken; token < tile.endToken; ++token)
      for (int64_t lane = 0; lane < triangle::kBlockKeys; ++lane) {
        const uint64_t dropped = triangle::DroppedLanes(data, row, tile.dense, row.start + token,
                                                        block, lane / triangle::kLanes);
        any |= dropped;
        if (dropped >> (lane % triangle::kLanes) & 1) continue;
        if (lane >= block.count) return false;
        ++visits[token * data.presentSlots + block.first + lane];
      }
    if (triangle::FullyKept(data, row, tile, block) && any != 0) return false;
  }
  return true;
}

}  // namespace

// `numbers`: S, L, N, first_valid, sink, window, last, P, T, heads of a group, value size.
// visits[S * T] counts how often a token keeps a key that its tile visits. Returns null, or what
// is wrong.
extern "C" const char* ascend_visits(const int64_t* numbers, int64_t* visits) {
  triangle::CallSizes sizes = {
      1, numbers[0], numbers[9] * 16, 16,         numbers[10], numbers[7], numbers[8], numbers[9],
      1, numbers[4], numbers[5],      numbers[6], 0,           0,          true,       true};
  TriangleAttentionTilingData data;
  if (!triangle::MakeTiling(sizes, data).empty()) return "refused";
  const BatchRow row = triangle::PlanRow(data, {numbers[1], numbers[2], numbers[3]});
  for (int64_t index = 0; index < triangle::CountTiles(data, row); ++index) {
    const TokenTile tile = triangle::TileAt(data, row, index);
    const int64_t tokens = tile.endToken - tile.firstToken;
    if (tokens < 1 || tokens * data.groupHeads > data.tileRows) return "a tile is too large";
    if (!Visit(data, row, tile, visits)) return "a tile's blocks overlap or are too long";
  }
  return nullptr;
}

// owners[item] counts the cores that take an item, of batches of `items` one after the other.
extern "C" void ascend_owners(const int64_t* items, int64_t batches, int64_t cores,
                              int64_t* owners) {
  for (int64_t core = 0; core < cores; ++core) {
    int64_t before = 0;
    for (int64_t b = 0; b < batches; ++b) {
      for (int64_t i = triangle::FirstOwned(before, core, cores); i < items[b]; i += cores)
        ++owners[before + i];
      before += items[b];
    }
  }
}

// Bytes of each memory that a tile of these sizes takes, and a core's workspace.
extern "C" const char* ascend_memories(int64_t group, int64_t head_size, int64_t value_size,
                                       int64_t* bytes) {
  static std::string said;
  const triangle::CallSizes sizes = {
      1,     1,    group * head_size, head_size, value_size, 0, 1, group, 1, 8, 512, 128, 0, 0,
      false, false};
  TriangleAttentionTilingData data;
  said = triangle::MakeTiling(sizes, data);
  if (said.empty()) said = triangle::CheckMemories(data, triangle::kMemories910b);
  if (!said.empty()) return said.c_str();
  const triangle::Memories used = triangle::MemoriesOf(data);
  const int64_t all[] = {used.unified, used.l1, used.l0a, used.l0b, used.l0c, data.workspaceCore};
  std::copy(std::begin(all), std::end(all), bytes);
  return nullptr;
}

// Chooses kernel, tiles, split and scratch layout of a call, from sizes alone.
#include <algorithm>
#include <mutex>

#include "launch.h"
#include "partial.cuh"

namespace trianglemix {
namespace {

constexpr int kMaxSplits = 16;
constexpr int kMinShare = 1024;       // keys of a share of a dense tail: merging costs, too
constexpr int kMinDecodeShare = 256;  // ... of a single tile, where latency is all
// Work items of dense rows: enough to balance, few enough to keep merging cheap. In dense mode
// whole tiles differ in length, so it takes more of them.
constexpr int kItemsPerMultiprocessor = 2;
constexpr int kWholeItemsPerMultiprocessor = 4;
constexpr int kManyTilesPerMultiprocessor = 4;  // from here on a tile may be large

int clamp_int(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(Clamp(x, low, high));
}

// Query heads of a tile: as many of those that share a key head as fit, in equal parts.
int heads_of_tile(int heads_per_key_head, int tile_rows) {
  for (int pack = std::min(heads_per_key_head, tile_rows); pack > 1; --pack) {
    if (heads_per_key_head % pack == 0) return pack;
  }
  return 1;
}

struct TileSize {
  int rows, keys, rest;
};

TileSize tile_size(Kernel kernel, int head_size, bool many_rows) {
  switch (kernel) {
    case Kernel::kSm90: {
      const int keys = sm90_key_tile(head_size);
      return {sm90_tile_rows, keys, sm90_key_edge(head_size)};
    }
    case Kernel::kSm80: {
      const int keys = sm80_key_tile(head_size);
      const int rows = many_rows && head_size <= 128 ? sm80_many_rows : sm80_few_rows;
      return {rows, keys, keys - sm80_sinks};
    }
    default:
      return {32, 32, 0};
  }
}

// How many rows are split over keys, and into how many shares. A dense tail always is; all rows are
// where whole tiles would leave multiprocessors idle (decode, short chunks on a long cache).
void plan_split(Plan& plan, const Device& device) {
  const int groups = plan.batch * plan.groups;
  const bool dense = plan.window == kNoWindow;
  const int wanted =
      device.multiprocessors * (dense ? kWholeItemsPerMultiprocessor : kItemsPerMultiprocessor);
  const int tiles = groups * CeilDivide(plan.length, plan.positions);
  const bool few = tiles < (dense ? wanted : device.multiprocessors);
  plan.split_rows = few ? plan.length : std::min(plan.length, plan.last);
  if (dense && !few) plan.split_rows = 0;
  plan.split_tiles = CeilDivide(plan.split_rows, plan.positions);
  const int split_tiles = std::max(1, groups * plan.split_tiles);
  // One wave where a tile is all there is to a group (decode), else several shares per block.
  const bool single = plan.split_tiles <= 1;
  const int items = single ? device.multiprocessors : wanted;
  const int shares = plan.capacity / (single ? kMinDecodeShare : kMinShare);
  plan.splits = clamp_int(std::min(items / split_tiles, shares), 1, kMaxSplits);
  plan.row_tiles = few && dense ? 0 : CeilDivide(plan.length, plan.positions) + 1;
  plan.split_items = groups * plan.split_tiles * plan.splits;
  plan.items = plan.split_items + groups * plan.row_tiles;
}

constexpr size_t kAlign = 256;
size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct ScratchLayout {
  size_t counters, items, weights, sums;
};

ScratchLayout layout_of(const Plan& plan) {
  const size_t tiles = static_cast<size_t>(plan.batch) * plan.groups * plan.split_tiles;
  const size_t rows = plan.splits > 1 ? tiles * plan.splits * plan.tile_rows : 0;
  return {aligned((1 + tiles * kTileParts) * sizeof(int)), aligned(plan.items * sizeof(Item)),
          aligned(rows * sizeof(float2)), aligned(rows * plan.value_head_size * sizeof(float))};
}

}  // namespace

int cached_heads(const AttentionProblem& problem) {
  constexpr int64_t kCachedBytes = int64_t{32} << 20;
  const int64_t numbers = problem.present_capacity * (problem.head_size + problem.value_head_size);
  const int64_t heads = kCachedBytes / Larger(1, numbers * BytesOf(problem.dtype));
  return clamp_int(heads, 1, problem.batch * problem.kv_num_heads);
}

const char* query_device(Device* device) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::mutex mutex;
  int id = 0;
  if (cudaError_t e = cudaGetDevice(&id); e != cudaSuccess) return cudaGetErrorString(e);
  if (id >= kDevices) return "the CUDA device's index is 64 or more";
  std::lock_guard<std::mutex> lock(mutex);
  if (known[id].multiprocessors == 0) {
    int major = 0, minor = 0, count = 0;
    cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id);
    if (e != cudaSuccess) return cudaGetErrorString(e);
    known[id] = {count, 10 * major + minor};
  }
  *device = known[id];
  return nullptr;
}

Kernel choose_kernel(const AttentionProblem& problem, const Device& device) {
  if (problem.dtype == DType::kFloat32) return Kernel::kFloat32;
  const int64_t d = problem.head_size;
  const bool fits = d == problem.value_head_size && (d == 64 || d == 96 || d == 128 || d == 256);
  return device.architecture == 90 && fits && problem.scale > 0 ? Kernel::kSm90 : Kernel::kSm80;
}

namespace {

// What both schedules share; `heads` query heads of a key head may share a tile.
Plan plan_tiles(const AttentionProblem& problem, Kernel kernel, const Device& device, int heads) {
  Plan plan{};
  plan.batch = static_cast<int>(problem.batch);
  plan.length = static_cast<int>(problem.query_length);
  plan.capacity = static_cast<int>(problem.present_capacity);
  plan.heads = static_cast<int>(problem.num_heads);
  plan.kv_heads = static_cast<int>(problem.kv_num_heads);
  plan.head_size = static_cast<int>(problem.head_size);
  plan.value_head_size = static_cast<int>(problem.value_head_size);
  const int64_t rows = problem.batch * problem.query_length * problem.num_heads;
  const bool many_rows =
      rows >= int64_t{kManyTilesPerMultiprocessor} * device.multiprocessors * sm80_many_rows;
  const TileSize tile =
      tile_size(kernel, std::max(plan.head_size, plan.value_head_size), many_rows);
  plan.tile_rows = tile.rows;
  plan.key_tile = tile.keys;
  plan.key_rest = tile.rest;
  plan.pack = heads_of_tile(heads, plan.tile_rows);
  plan.pack_reciprocal = CeilDivide(1 << 16, plan.pack);
  plan.positions = plan.tile_rows / plan.pack;
  plan.groups = plan.heads / plan.pack;
  plan.sink = clamp_int(problem.pattern.sink, 0, kMaxTokens);
  plan.window = problem.pattern.window == kDenseWindow || problem.pattern.window >= kMaxTokens
                    ? kNoWindow
                    : static_cast<int>(problem.pattern.window);
  plan.last = clamp_int(problem.pattern.last, 1, kMaxTokens);
  plan.scale = problem.scale;
  plan.softcap = problem.softcap;
  plan.exponent = (problem.softcap > 0 ? 1.0f : problem.scale) * kLog2E;
  return plan;
}

}  // namespace

Plan make_plan(const AttentionProblem& problem, Kernel kernel, const Device& device) {
  const int group = static_cast<int>(problem.num_heads / problem.kv_num_heads);
  Plan plan = plan_tiles(problem, kernel, device, group);
  plan_split(plan, device);
  plan.wave = plan.batch * plan.groups;
  if (plan.window == kNoWindow) {  // tiles that visit all keys: as many heads' as are cached
    plan.wave = Smaller(plan.wave, cached_heads(problem) * plan.groups / plan.kv_heads);
    plan.wave = Larger(plan.wave, 1);
  }
  return plan;
}

Plan make_block_plan(const AttentionProblem& problem, Kernel kernel, const Device& device) {
  Plan plan = plan_tiles(problem, kernel, device, 1);
  plan.window = kNoWindow;
  // Tiles are cut at the edges of blocks. One is an item, or where they are too few for the GPU
  // several shares of its keys.
  const int tiles =
      Smaller(CeilDivide(plan.capacity, int{kBlock}), CeilDivide(plan.length, int{kBlock}) + 1);
  plan.row_tiles = tiles * CeilDivide(int{kBlock}, plan.positions);
  plan.split_tiles = plan.row_tiles;
  const int items = plan.batch * plan.groups * plan.row_tiles;
  const int wanted = device.multiprocessors * kItemsPerMultiprocessor;
  plan.splits = clamp_int(wanted / std::max(1, items), 1, kMaxSplits);
  plan.items = items * plan.splits;
  return plan;
}

size_t scratch_bytes(const Plan& plan) {
  const ScratchLayout layout = layout_of(plan);
  return layout.counters + layout.items + layout.weights + layout.sums;
}

Scratch scratch_at(const Plan& plan, void* workspace) {
  const ScratchLayout layout = layout_of(plan);
  char* base = static_cast<char*>(workspace);
  int* counters = reinterpret_cast<int*>(base);
  base += layout.counters;
  Item* items = reinterpret_cast<Item*>(base);
  base += layout.items;
  return {counters,
          counters + 1,
          items,
          reinterpret_cast<float2*>(base),
          reinterpret_cast<float*>(base + layout.weights),
          nullptr,
          0};
}

}  // namespace trianglemix

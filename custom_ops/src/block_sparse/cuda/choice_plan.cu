// Sizes and scratch of a choice, from sizes alone, and the mask for those who look at it.
#include <algorithm>

#include "choice.h"

namespace trianglemix {
namespace {

constexpr size_t kAlign = 256;
size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct ChoiceLayout {
  size_t bits, unit;  // bytes; `unit` of the sums of one unit
};

ChoiceLayout layout_of(const ChoicePlan& plan, Kernel kernel) {
  const size_t tiles = static_cast<size_t>(plan.row_tiles) * plan.batch * plan.heads;
  const size_t number = kernel == Kernel::kFloat32 ? 4 : 2;
  return {aligned(tiles * plan.words * sizeof(uint32_t)),
          static_cast<size_t>(plan.words) * 32 * kSamples * number};
}

int rows_of_item(Kernel kernel, const ChoicePlan& plan, const Device& device) {
  switch (kernel) {
    case Kernel::kSm90: {
      const int64_t rows = int64_t{plan.row_tiles} * plan.batch * plan.heads * kSamples;
      const int most = choice_most_rows_sm90(plan.head_size);
      if (rows >= int64_t{2} * most * device.multiprocessors) return most;
      return rows >= int64_t{128} * device.multiprocessors ? 128 : 64;
    }
    case Kernel::kSm80:
      return choice_rows_sm80(plan.head_size);
    default:
      return choice_rows_float32;
  }
}

__global__ void block_mask_kernel(ChoiceParams params, uint8_t* mask, int tiles) {
  const ChoicePlan& plan = params.plan;
  const int tile = blockIdx.x % tiles, row_head = blockIdx.x / tiles;
  const int head = row_head % plan.heads, b = row_head / plan.heads;
  const TiledRow row = tiled_row(plan, params.lengths, b);
  uint8_t* line = mask + static_cast<int64_t>(blockIdx.x) * tiles;
  const bool exists = row.begin <= tile && tile < row.end_tile;
  const bool all = params.scratch.bits == nullptr;
  const int number = exists ? tile_number(plan, b, head, tile - static_cast<int>(row.begin)) : 0;
  const uint32_t* bits = params.scratch.bits + static_cast<int64_t>(number) * plan.words;
  for (int block = threadIdx.x; block < tiles; block += blockDim.x) {
    const bool causal = exists && block <= tile;
    line[block] = causal && (all || bits[block / 32] >> block % 32 & 1);
  }
}

}  // namespace

ChoicePlan make_choice_plan(const BlockSparseProblem& problem, Kernel kernel, const Plan& attention,
                            const Device& device) {
  ChoicePlan plan{};
  plan.batch = attention.batch;
  plan.length = attention.length;
  plan.capacity = attention.capacity;
  plan.heads = attention.heads;
  plan.kv_heads = attention.kv_heads;
  plan.group = attention.heads / attention.kv_heads;
  plan.head_size = attention.head_size;
  plan.value_head_size = attention.value_head_size;
  plan.rule = {problem.pattern, problem.mass, problem.min_length};
  plan.words = CeilDivide(CeilDivide(plan.capacity, int{kBlock}), 32);
  plan.positions = attention.positions;
  plan.tile_items = CeilDivide(int{kBlock}, plan.positions);
  plan.row_tiles = attention.row_tiles / plan.tile_items;
  plan.splits = attention.splits;
  plan.wave = cached_heads(problem);
  plan.scale = attention.scale;
  plan.softcap = attention.softcap;
  plan.exponent = attention.exponent;
  plan.units = rows_of_item(kernel, plan, device) / kSamples;
  plan.row_items = CeilDivide(plan.row_tiles * plan.group, plan.units);
  plan.items = plan.row_items * plan.batch * plan.kv_heads;
  const ChoiceLayout layout = layout_of(plan, kernel);
  const size_t taken = layout.bits + scratch_bytes(attention);
  const size_t left = taken < kChoiceScratch ? kChoiceScratch - taken : 0;
  const int64_t at_once = static_cast<int64_t>(left / (layout.unit * plan.units));
  const int waves = kernel == Kernel::kSm90 ? 1 : 2;  // blocks that a multiprocessor holds
  plan.blocks =
      static_cast<int>(Clamp(at_once, 1, Smaller(plan.items, waves * device.multiprocessors)));
  return plan;
}

size_t choice_bytes(const ChoicePlan& plan, Kernel kernel) {
  const ChoiceLayout layout = layout_of(plan, kernel);
  return layout.bits + layout.unit * plan.units * plan.blocks;
}

ChoiceScratch choice_scratch_at(const ChoicePlan& plan, Kernel kernel, void* memory) {
  char* base = static_cast<char*>(memory);
  return {reinterpret_cast<uint32_t*>(base), base + layout_of(plan, kernel).bits};
}

cudaError_t launch_block_mask(const BlockSparseProblem& problem, const ChoiceParams& params,
                              cudaStream_t stream) {
  const int tiles = static_cast<int>(CeilDivide(problem.present_capacity, kBlock));
  const int lines = tiles * params.plan.batch * params.plan.heads;
  if (lines == 0) return cudaSuccess;
  block_mask_kernel<<<lines, 128, 0, stream>>>(params, problem.block_mask, tiles);
  return cudaGetLastError();
}

}  // namespace trianglemix

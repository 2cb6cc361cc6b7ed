// The choice of blocks on Hopper: sampled scores by warpgroup matrix products, then the threshold.
//
// A block is one producer warp, which streams key tiles, the last first, and warpgroups of 64
// sampled rows each (8 units), all of which each tile serves. Nothing but these tiles is shared: a
// warp has the scores of its two units, sums them over each block, and chooses. Warpgroups set out
// for their products in turn: else all would be done at once, and then all take exponentials, while
// the tensor cores wait. Cost per item: rows * keys * 2 * D operations, and as many exponentials as
// scores.
#pragma once

#include <cuda.h>

#include "../../cuda/sm90_products.cuh"
#include "../../cuda/sm90_ring.cuh"
#include "choose.cuh"

namespace trianglemix {

template <int kHeadSize, int kSampledRows>
struct ChoiceTile {
  static constexpr int kD = kHeadSize, kRows = kSampledRows, kGroups = kRows / 64;
  static constexpr int kUnits = kRows / int{kSamples}, kThreads = 128 * (1 + kGroups);
  static constexpr int kKeys = kBlock;
  static constexpr int kSwizzle = kD % 64 == 0 ? 128 : 64;
  static constexpr int kSlabColumns = kSwizzle / 2, kSlabs = kD / kSlabColumns;
  static constexpr int kQueryBytes = kRows * kD * 2, kSlotBytes = kKeys * kD * 2;
  static constexpr int kSlots = Smaller(8, (225 * 1024 - kQueryBytes) / kSlotBytes);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = kGroups == 3 ? 152 : 224;
  static constexpr int kShared = 1024 + kQueryBytes + kSlots * (kSlotBytes + 16);
};

struct ChoiceSm90Params {
  CUtensorMap key;
  ChoiceParams choice;
};

template <typename Tile>
struct ChoiceShared {
  uint32_t base;
  __device__ explicit ChoiceShared(char* raw) {
    base = shared_address(raw) + (1024 - shared_address(raw) % 1024) % 1024;
    asm volatile("" : "+r"(base));  // kept, not found again for each tile
  }
  __device__ uint32_t query() const { return base; }
  __device__ uint32_t slot(int i) const { return base + Tile::kQueryBytes + i * Tile::kSlotBytes; }
  __device__ uint32_t full(int i) const { return slot(Tile::kSlots) + 8 * i; }
  __device__ uint32_t empty(int i) const { return full(Tile::kSlots + i); }
};

template <typename Tile>
struct ChoiceProducer {
  const ChoiceSm90Params& params;
  const ChoiceShared<Tile> shared;

  __device__ void run() {
    const ChoicePlan& plan = params.choice.plan;
    Ring<Tile::kSlots> slots;
    for (int round = 0;; ++round) {
      const int number = choice_number(plan, blockIdx.x, round);
      if (round * plan.blocks >= plan.items) return;
      if (number >= plan.items) continue;
      const ChoiceItem item = choice_item(plan, params.choice.lengths, number);
      if (item.count == 0) continue;
      for (int block = item.last_tile(plan); block >= 0; --block) {
        mbarrier_wait(shared.empty(slots.index), slots.parity ^ 1);
        mbarrier_expect(shared.full(slots.index), Tile::kSlotBytes);
#pragma unroll
        for (int slab = 0; slab < Tile::kSlabs; ++slab) {
          tma_load_3d(shared.slot(slots.index) + slab * Tile::kKeys * Tile::kSwizzle, &params.key,
                      shared.full(slots.index), slab * Tile::kSlabColumns,
                      item.first_valid + int{kBlock} * block,
                      item.b * plan.kv_heads + item.kv_head);
        }
        slots.advance();
      }
    }
  }
};

template <typename T, typename Tile>
struct ChoiceConsumer {
  const ChoiceSm90Params& params;
  const ChoiceShared<Tile> shared;
  const int group, warp, lane;  // warpgroup, warp of the block's consumers
  Ring<Tile::kSlots> slots;
  int turns = 0;

  __device__ ChoiceConsumer(const ChoiceSm90Params& params, const ChoiceShared<Tile>& shared)
      : params(params),
        shared(shared),
        group(threadIdx.x / 128 - 1),
        warp(threadIdx.x / 32 - 4),
        lane(threadIdx.x % 32) {}

  __device__ const ChoicePlan& plan() const { return params.choice.plan; }

  // The warpgroup's sampled rows, zeros where there is none.
  __device__ void load_queries(const ChoiceItem& item) {
    constexpr int kPieces = Tile::kD / 8, kLinePieces = Tile::kSwizzle / 16;
    for (int i = threadIdx.x % 128; i < 64 * kPieces; i += 128) {
      const int r = 64 * group + i / kPieces, piece = i % kPieces, unit = r / int{kSamples};
      uint4 x = {0, 0, 0, 0};
      if (unit < item.count) {
        const int slot = item.first_valid + int{kBlock} * item.tile(plan(), unit) +
                         int{kSampleStep} * (r % int{kSamples} + 1) - 1;
        const int64_t token = static_cast<int64_t>(item.b) * plan().length + slot - item.start;
        const int64_t line = token * plan().heads + item.head(plan(), unit);
        const auto* source = static_cast<const uint4*>(params.choice.query) + line * kPieces;
        if (slot < item.sampled_end) x = source[piece];
      }
      const int swizzle = Tile::kSwizzle == 128 ? r % 8 : r / 2 % 4;
      store_shared(shared.query() + (piece / kLinePieces * Tile::kRows + r) * Tile::kSwizzle +
                       ((piece % kLinePieces) ^ swizzle) * 16,
                   x);
    }
    fence_async_shared();
    named_barrier_sync(1 + group, 128);
  }

  __device__ __forceinline__ void release(int slot) {
    if (lane == 0) mbarrier_arrive(shared.empty(slot));
  }

  // A warpgroup's turn to set out for a product, one for each tile. The first is the first one's.
  __device__ __forceinline__ void begin_turn() {
    if (group > 0 || turns++ > 0) named_barrier_sync(4 + group, 256);
  }
  __device__ __forceinline__ void end_turn() {
    named_barrier_arrive(4 + (group + 1) % Tile::kGroups, 256);
  }

  // Scores of the warpgroup's rows with the next slot's keys.
  __device__ __forceinline__ void score(float (&s)[Tile::kKeys / 2]) {
    const int slot = slots.index;
    mbarrier_wait(shared.full(slot), slots.parity);
    begin_turn();
    wgmma_fence();
    issue_products<T, Tile::kD, Tile::kSwizzle, Tile::kRows, Tile::kKeys>(
        s, shared.query() + 64 * group * Tile::kSwizzle, shared.slot(slot));
    end_turn();
    wgmma_wait<0>();
    pin(s);
    release(slot);
    slots.advance();
  }

  __device__ __forceinline__ void visit(UnitSums& sums, int block, bool plain) {
    float s[Tile::kKeys / 2];
    score(s);
    if (plain) {
      sums.template add<false>(s, plan().exponent, int{kBlock} * block);
    } else {
      if (plan().softcap > 0.0f) cap_scores(s, plan().scale, plan().softcap);
      sums.template add<true>(s, plan().exponent, int{kBlock} * block);
    }
    sums.close(block);
  }

  __device__ __forceinline__ void pass(const ChoiceItem& item) {
    load_queries(item);
    UnitSums sums;
    sums.open(plan(), item, 2 * warp, sums_of_unit(params.choice, Tile::kUnits, 2 * warp));
    // Tiles ascend with units: the warpgroup's last, and the warp's first.
    const int last = item.tile(plan(), Smaller(8 * group + 7, item.count - 1));
    const int plain = plan().softcap > 0.0f ? 0 : sums.tile[0];
    int block = item.last_tile(plan());
    for (; block > last; --block) {
      mbarrier_wait(shared.full(slots.index), slots.parity);
      begin_turn();
      end_turn();
      release(slots.index);
      slots.advance();
    }
#pragma unroll 1
    for (; block >= 0; --block) visit(sums, block, block < plain);
    sums.choose(params.choice, item, 2 * warp);
    named_barrier_sync(1 + group, 128);  // the queries are done with
  }

  __device__ void run() {
    for (int round = 0; round * plan().blocks < plan().items; ++round) {
      const int number = choice_number(plan(), blockIdx.x, round);
      if (number >= plan().items) continue;
      const ChoiceItem item = choice_item(plan(), params.choice.lengths, number);
      if (item.count > 0) pass(item);
    }
    if (group == 0 && turns > 0) begin_turn();  // the last one's signal
  }
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    choice_sm90(const __grid_constant__ ChoiceSm90Params params) {
  extern __shared__ char raw[];
  const ChoiceShared<Tile> shared(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      mbarrier_init(shared.full(i), 1);
      mbarrier_init(shared.empty(i), 4 * Tile::kGroups);  // consumer warps
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) ChoiceProducer<Tile>{params, shared}.run();
    if (threadIdx.x >= 32) {
      fill_rest(params.choice, blockIdx.x * 96 + threadIdx.x - 32, 96 * gridDim.x, 2);
    }
  } else {
    registers_take<Tile::kConsumerRegisters>();
    ChoiceConsumer<T, Tile>(params, shared).run();
  }
}

}  // namespace trianglemix

// The choice of blocks on Hopper: sampled scores by warpgroup matrix products, then the threshold.
//
// A block is one producer (a thread, or for keys by pages a warp), which streams key tiles, the
// last first, and warpgroups of 64 sampled rows each (8 units), all of which each tile serves.
// Nothing but these tiles is shared: a warp has the scores of its two units, sums them over each
// block, and chooses. Warpgroups set out for their products in turn: else all would be done at
// once, and then all take exponentials, while the tensor cores wait. (The two that share the rows
// of a small item have half of its blocks each, and their own slots of the ring.) Cost per item:
// rows * keys * 2 * D operations, and as many exponentials as scores.
#pragma once

#include <cuda.h>

#include "../../cuda/sm90_pages.cuh"
#include "../../cuda/sm90_products.cuh"
#include "../../cuda/sm90_ring.cuh"
#include "choose.cuh"

namespace trianglemix {

template <int kHeadSize, int kSampledRows>
struct ChoiceTile {
  static constexpr int kD = kHeadSize, kRows = kSampledRows;
  // Two warpgroups share the rows of a small item, and take its blocks in turn.
  static constexpr int kSplit = kRows == 64 ? 2 : 1, kGroups = kRows / 64 * kSplit;
  static constexpr int kUnits = kRows / int{kSamples}, kThreads = 128 * (1 + kGroups);
  static constexpr int kKeys = kBlock;
  static constexpr int kSwizzle = kD % 64 == 0 ? 128 : 64;
  static constexpr int kSlabColumns = kSwizzle / 2, kSlabs = kD / kSlabColumns;
  static constexpr int kQueryBytes = kRows * kD * 2, kSlotBytes = kKeys * kD * 2;
  static constexpr int kTableBytes = kSplit > 1 ? kRows * kSplit * int{sizeof(float2)} : 0;
  static constexpr int kSlots = Smaller(8, (224 * 1024 - kQueryBytes) / kSlotBytes);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = kGroups == 3 ? 152 : 224;
  static constexpr int kShared = 1024 + kQueryBytes + kSlots * (kSlotBytes + 16) + kTableBytes;
};

struct ChoiceSm90Params {
  CUtensorMap key;
  ChoiceParams choice;
};

template <typename Tile>
struct ChoiceShared {
  uint32_t base;
  float2* table;  // [rows, kSplit]: reference and whole of a row, as each warpgroup has them

  __device__ explicit ChoiceShared(char* raw) {
    const int skipped = (1024 - shared_address(raw) % 1024) % 1024;
    base = shared_address(raw) + skipped;
    asm volatile("" : "+r"(base));  // kept, not found again for each tile
    table = reinterpret_cast<float2*>(raw + skipped + Tile::kQueryBytes +
                                      Tile::kSlots * (Tile::kSlotBytes + 16));
  }
  __device__ uint32_t query() const { return base; }
  __device__ uint32_t slot(int i) const { return base + Tile::kQueryBytes + i * Tile::kSlotBytes; }
  __device__ uint32_t full(int i) const { return slot(Tile::kSlots) + 8 * i; }
  __device__ uint32_t empty(int i) const { return full(Tile::kSlots + i); }
};

template <typename Tile, Layout kLayout>
struct ChoiceProducer {
  const ParamsOf<ChoiceSm90Params, kLayout>& params;
  const ChoiceShared<Tile> shared;

  __device__ __forceinline__ void open_slot(const Ring<Tile::kSlots>& slots) const {
    mbarrier_wait(shared.empty(slots.index), slots.parity ^ 1);
    if (leads<kLayout>()) mbarrier_expect(shared.full(slots.index), Tile::kSlotBytes);
  }
  __device__ __forceinline__ static int first_slot(const ChoiceItem& item, int block) {
    return item.first_valid + int{kBlock} * block;
  }
  __device__ __forceinline__ void load(const ChoiceItem& item, const Ring<Tile::kSlots>& slots,
                                       int block) const {
    if constexpr (kLayout == Layout::kPages) {
      const PagedPlace place =
          find_pages<Tile>(params.pages, item.b, first_slot(item, block), item.sampled_end);
      open_slot(slots);
      load_pages<Tile>(params.pages, params.key, shared.slot(slots.index), shared.full(slots.index),
                       item.kv_head, place);
    } else {
      open_slot(slots);
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        tma_load_3d(shared.slot(slots.index) + slab * Tile::kKeys * Tile::kSwizzle, &params.key,
                    shared.full(slots.index), slab * Tile::kSlabColumns, first_slot(item, block),
                    item.b * params.choice.plan.kv_heads + item.kv_head);
      }
    }
  }

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
        load(item, slots, block);
        slots.advance();
      }
    }
  }
};

template <typename T, typename Tile>
struct ChoiceConsumer {
  const ChoiceSm90Params& params;
  const ChoiceShared<Tile> shared;
  using Sums = UnitSums<Tile::kSplit>;
  const int strip, turn;  // rows 64 * strip ... of the item; which of its blocks
  const int warp, lane;   // warp of the strip: it has two units
  Ring<Tile::kSlots> slots;
  int turns = 0;

  __device__ ChoiceConsumer(const ChoiceSm90Params& params, const ChoiceShared<Tile>& shared)
      : params(params),
        shared(shared),
        strip((threadIdx.x / 128 - 1) / Tile::kSplit),
        turn((threadIdx.x / 128 - 1) % Tile::kSplit),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32) {}

  __device__ int group() const { return strip * Tile::kSplit + turn; }
  __device__ int unit() const { return 8 * strip + 2 * warp; }

  __device__ const ChoicePlan& plan() const { return params.choice.plan; }

  // The warpgroup's sampled rows, zeros where there is none.
  __device__ void load_queries(const ChoiceItem& item) {
    constexpr int kPieces = Tile::kD / 8, kLinePieces = Tile::kSwizzle / 16;
    for (int i = threadIdx.x % 128; i < 64 * kPieces; i += 128) {
      const int r = 64 * strip + i / kPieces, piece = i % kPieces, unit = r / int{kSamples};
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
    named_barrier_sync(1 + group(), 128);
  }

  __device__ __forceinline__ void release(int slot) {
    if (lane == 0) mbarrier_arrive(shared.empty(slot));
  }

  // A warpgroup's turn to set out for a product, one for each tile. The first is the first one's.
  __device__ __forceinline__ void begin_turn() {
    if (Tile::kSplit > 1) return;
    if (strip > 0 || turns++ > 0) named_barrier_sync(4 + strip, 256);
  }
  __device__ __forceinline__ void end_turn() {
    if (Tile::kSplit > 1) return;
    named_barrier_arrive(4 + (strip + 1) % Tile::kGroups, 256);
  }

  // Adds the next slot's keys, which are those of `block`. While the tensor cores are at its
  // scores, the warpgroup ends the block before it, `open` (-1: none).
  __device__ __forceinline__ void visit(Sums& sums, int block, int open, bool plain) {
    float s[Tile::kKeys / 2];
    const int slot = slots.index;
    mbarrier_wait(shared.full(slot), slots.parity);
    begin_turn();
    wgmma_fence();
    issue_products<T, Tile::kD, Tile::kSwizzle, Tile::kRows, Tile::kKeys>(
        s, shared.query() + 64 * strip * Tile::kSwizzle, shared.slot(slot));
    end_turn();
    if (open >= 0) sums.close(open);
    wgmma_wait<0>();
    pin(s);
    release(slot);
    slots.advance();
    if (plain) {
      sums.template add<false>(s, plan().exponent, int{kBlock} * block);
    } else {
      if (plan().softcap > 0.0f) cap_scores(s, plan().scale, plan().softcap);
      sums.template add<true>(s, plan().exponent, int{kBlock} * block);
    }
  }

  // Chooses for the warp's units, or with another warp for one each: their sums have references of
  // their own, and one whole.
  __device__ __forceinline__ void choose(const ChoiceItem& item, const Sums& sums) const {
    if constexpr (Tile::kSplit == 1) {
      sums.choose(params.choice, item, unit());
    } else {
      float2* table = shared.table + 16 * warp * Tile::kSplit;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float whole = sums.last[r] >= 0 ? sums.whole[r] : 0.0f;
        float2& place = table[(8 * r + lane / 4) * Tile::kSplit + turn];
        if (lane % 4 == 0) place = {sums.reference[r], whole};
      }
      named_barrier_sync(4, 256);
      Shares share;
#pragma unroll
      for (int k = 0; k < kSamples; ++k) {
        const float2* both = table + (8 * turn + k) * Tile::kSplit;
        const float peak = fmaxf(both[0].x, both[1].x);
        const float factor[2] = {exp2_approx(both[0].x - peak), exp2_approx(both[1].x - peak)};
        const float whole = both[0].y * factor[0] + both[1].y * factor[1];
        share.of[k] = whole > 0.0f ? factor[lane % 2] / whole : 0.0f;  // lanes are blocks
      }
      if (unit() + turn < item.count) {
        choose_blocks(params.choice, item, unit() + turn, turn ? sums.sums[1] : sums.sums[0],
                      share);
      }
      named_barrier_sync(4, 256);
    }
  }

  __device__ __forceinline__ void pass(const ChoiceItem& item) {
    load_queries(item);
    Sums sums;
    sums.open(plan(), item, unit(), sums_of_unit(params.choice, Tile::kUnits, unit()), turn);
    // Tiles ascend with units: the warpgroup's last, and the warp's first.
    const int last = item.tile(plan(), Smaller(8 * strip + 7, item.count - 1));
    const int plain = plan().softcap > 0.0f ? 0 : sums.tile[0];
    int block = item.last_tile(plan());
    for (; block > last; --block) {
      mbarrier_wait(shared.full(slots.index), slots.parity);
      begin_turn();
      end_turn();
      release(slots.index);
      slots.advance();
    }
    if (block % Tile::kSplit != turn) --block, slots.advance();
    int open = -1;
#pragma unroll 1
    for (; block >= 0; block -= Tile::kSplit) {
      visit(sums, block, open, block < plain);
      open = block;
      if (Tile::kSplit > 1 && block > 0) slots.advance();  // the other warpgroup's
    }
    if (open >= 0) sums.close(open);
    choose(item, sums);
    named_barrier_sync(1 + group(), 128);  // the queries are done with
  }

  __device__ void run() {
    for (int round = 0; round * plan().blocks < plan().items; ++round) {
      const int number = choice_number(plan(), blockIdx.x, round);
      if (number >= plan().items) continue;
      const ChoiceItem item = choice_item(plan(), params.choice.lengths, number);
      if (item.count > 0) pass(item);
    }
    if (strip == 0 && turns > 0) begin_turn();  // the last one's signal
  }
};

template <typename T, typename Tile, Layout kLayout>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    choice_sm90(const __grid_constant__ ParamsOf<ChoiceSm90Params, kLayout> params) {
  extern __shared__ char raw[];
  const ChoiceShared<Tile> shared(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      mbarrier_init(shared.full(i), 1);
      mbarrier_init(shared.empty(i), 4 * Tile::kGroups / Tile::kSplit);  // consumer warps
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<Tile::kProducerRegisters>();
    if (threadIdx.x < kLoaders<kLayout>) ChoiceProducer<Tile, kLayout>{params, shared}.run();
    if (threadIdx.x >= 32) {
      fill_rest(params.choice, blockIdx.x * 96 + threadIdx.x - 32, 96 * gridDim.x, 2);
    }
  } else {
    registers_take<Tile::kConsumerRegisters>();
    ChoiceConsumer<T, Tile>(params, shared).run();
  }
}

}  // namespace trianglemix

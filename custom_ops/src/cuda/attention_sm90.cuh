// Attention on Hopper: warpgroup matrix products fed by the bulk copy engine, persistent blocks.
//
// A block is a producer (a thread, or a warp) and two consumer warpgroups of 64 tile rows each. The
// producer draws work items from a counter and streams Q, K and V tiles through shared memory. A
// warpgroup has the scores of tile t and the values of tile t - 1 in flight together, across items
// too: while an item's rows are stored, the next one's first scores are under way. While it weighs
// its scores the other warpgroup's products fill the tensor cores. An item of key ranges begins
// with a small tile, 16 sinks and the kEdge keys that do not fill whole tiles; then come whole
// tiles in ascending order, of which only the first and the last need a mask. Cost per item: 128
// rows * (window + positions + at most kKeys + 16) * 4 * D operations. One of key blocks has whole
// tiles alone, of which the last needs a mask.
#pragma once

#include "sm90_blocks.cuh"
#include "sm90_producer.cuh"
#include "sm90_ranges.cuh"

namespace trianglemix {

template <typename T, int kD, Schedule kSchedule>
struct ConsumerOf;
template <typename T, int kD>
struct ConsumerOf<T, kD, Schedule::kRanges> : RangeConsumer<T, kD> {
  using RangeConsumer<T, kD>::RangeConsumer;
};
template <typename T, int kD>
struct ConsumerOf<T, kD, Schedule::kBlocks> : BlockConsumer<T, kD> {
  using BlockConsumer<T, kD>::BlockConsumer;
};

template <typename T, int kD, Schedule kSchedule, Layout kLayout>
__global__ void __launch_bounds__(Sm90Tile<kD, kSchedule>::kThreads, 1)
    attention_sm90(const __grid_constant__ ParamsOf<Sm90Params, kLayout> params) {
  using Tile = Sm90Tile<kD, kSchedule>;
  extern __shared__ char raw[];
  const Sm90Shared<Tile> shared(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      mbarrier_init(shared.full(i), 1);
      mbarrier_init(shared.empty(i), 4 * Tile::kStrips);  // consumer warps
    }
    for (int i = 0; i < Tile::kQueries; ++i) {
      mbarrier_init(shared.query_full(i), 1);
      mbarrier_init(shared.query_empty(i), 128 * Tile::kStrips);  // consumer threads
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<Tile::kProducerRegisters>();
    if (threadIdx.x < kLoaders<kLayout>) Producer<kD, kSchedule, kLayout>(params, shared).run();
  } else {
    registers_take<Tile::kConsumerRegisters>();
    ConsumerOf<T, kD, kSchedule>(params, shared).run();
  }
}

}  // namespace trianglemix

// Makes the kernel of one instruction set: its entries, for tiles of many and of few rows, and for
// sums over blocks.
#pragma once

#include "block_sums.h"
#include "few_rows_tile.h"
#include "panel_tile.h"

namespace trianglemix::cpu {
namespace {

template <class V>
size_t StateFloats(const AttentionProblem& problem, int64_t rows) {
  return Larger(PanelTile<V, float>::StateFloats(problem, rows),
                FewRowsTile<V, float>::StateFloats(problem));
}

template <class V>
size_t ScratchFloats(const AttentionProblem& problem) {
  return Larger(PanelTile<V, float>::ScratchFloats(problem),
                FewRowsTile<V, float>::ScratchFloats(problem));
}

template <class V, class Tiling>
void RunTile(const TileCall& call) {
  Tiling tile(call.problem, call.row, call.tile, call.scratch, call.state);
  if (call.merged_pieces == 0) {
    tile.Attend(call.ranges, call.range_count);
    if (call.tile.split >= 0) return;
  }
  const size_t floats = StateFloats<V>(call.problem, kTileRows);
  for (int64_t piece = 1; piece < call.merged_pieces; ++piece)
    tile.Merge(call.state + piece * floats);
  tile.StoreOutput();
}

template <class V>
void RunAnyTile(const TileCall& call) {
  WithElement(call.problem.dtype, [&](auto element) {
    using Element = decltype(element);
    if (call.tile.rows <= V::kFewRows)
      RunTile<V, FewRowsTile<V, Element>>(call);
    else
      RunTile<V, PanelTile<V, Element>>(call);
  });
}

template <class V>
size_t SumsScratchFloats(const AttentionProblem& problem, int64_t blocks) {
  return BlockSums<V, float>::ScratchFloats(problem, blocks);
}

template <class V>
void SumBlocks(const SumsCall& call) {
  WithElement(call.problem.dtype,
              [&](auto element) { BlockSums<V, decltype(element)>(call).Run(); });
}

template <class V>
constexpr Variant MakeVariant(const char* name) {
  return {name,           V::kVectors * V::kWidth, &ScratchFloats<V>, &StateFloats<V>,
          &RunAnyTile<V>, &SumsScratchFloats<V>,   &SumBlocks<V>};
}

}  // namespace
}  // namespace trianglemix::cpu

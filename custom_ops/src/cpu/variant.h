// Makes the kernel of one instruction set: its entries, for tiles of many and of few rows.
#pragma once

#include "few_rows_tile.h"
#include "panel_tile.h"

namespace trianglemix::cpu {
namespace {

template <class V>
size_t StateFloats(const AttentionProblem& problem) {
  return Larger(PanelTile<V, float>::StateFloats(problem),
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
    tile.Attend();
    if (call.tile.split >= 0) return;
  }
  const size_t floats = StateFloats<V>(call.problem);
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
constexpr Variant MakeVariant(const char* name) {
  return {name, V::kVectors * V::kWidth, &ScratchFloats<V>, &StateFloats<V>, &RunAnyTile<V>};
}

}  // namespace
}  // namespace trianglemix::cpu

// The work of one call, cut into tiles: rows of a key head's query group, and keys where few tiles
// would leave threads idle.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"
#include "../tiles.h"

namespace trianglemix::cpu {

// Rows of a tile: a multiple of every variant's panel. More rows share each load of a key block,
// fewer rows visit fewer keys that only some of them keep.
constexpr int64_t kTileRows = 96;

// Row r of a group is head r % (H/G) of token r / (H/G): the heads of a token lie side by side, so
// that a tile spans few positions.
struct Tile {
  int64_t batch;
  int64_t kv_head;
  int64_t first_row;
  int64_t rows;
  bool dense;
  KeyRange keys;  // of the row's keys, the part that this tile visits
  int64_t split;  // index into Plan::splits, or -1: the tile visits all its keys
  int64_t piece;
};

// Tiles of the same rows and different keys: their results are merged.
struct Split {
  int64_t first_result;  // of the pieces' partial results
  int64_t pieces;
};

struct Plan {
  std::vector<BatchRow> batch_rows;
  std::vector<Tile> tiles;  // the longest first
  std::vector<Split> splits;
  int64_t results = 0;
};

Plan MakePlan(const AttentionProblem& problem);

// Keys that `rows` rows of the tile's group, from `first` on, keep between them.
TRIANGLEMIX_TILES KeyRanges KeysOfTile(const AttentionProblem& problem, const BatchRow& row,
                                       const Tile& tile, int64_t first, int64_t rows) {
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  return KeysOfRows(problem.pattern, tile.dense, row.start + first / group,
                    row.start + (first + rows - 1) / group, row.first_valid);
}

}  // namespace trianglemix::cpu

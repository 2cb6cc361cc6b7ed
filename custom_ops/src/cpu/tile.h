// A tile: rows that visit keys together, as every operator cuts its calls into them.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "../tiles.h"

namespace trianglemix::cpu {

// Rows of a tile that holds all heads of a group: a multiple of every variant's panel. More rows
// share each load of a key block, fewer rows visit fewer keys that only some of them keep.
constexpr int64_t kTileRows = 96;
// Rows of any tile.
constexpr int64_t kMostTileRows = 128;

// Row r is head first_head + r % heads of token first_token + r / heads * step: the heads of a
// token lie side by side, so that a tile spans few positions.
struct Tile {
  int64_t batch;
  int64_t kv_head;
  int64_t first_head;
  int64_t heads;  // all of kv_head's
  int64_t first_token = 0;
  int64_t step = 1;
  int64_t first_row = 0;
  int64_t rows = 0;
  bool dense = true;   // rows keep all keys that the tile visits, else the pattern's
  KeyRange keys{};     // what a tile visits lies in here
  int64_t split = -1;  // index into Plan::splits, or -1: the tile visits all its keys
  int64_t piece = 0;
  int64_t choice = -1;  // the operator's own index of the keys to visit; -1: those that rows keep
};

TRIANGLEMIX_TILES int64_t TokenOfRow(const Tile& tile, int64_t r) {
  return tile.first_token + r / tile.heads * tile.step;
}

// Keys that `rows` rows of the tile, from `first` on, keep between them.
TRIANGLEMIX_TILES KeyRanges KeysOfTile(const AttentionProblem& problem, const BatchRow& row,
                                       const Tile& tile, int64_t first, int64_t rows) {
  return KeysOfRows(problem.pattern, tile.dense, row.start + TokenOfRow(tile, first),
                    row.start + TokenOfRow(tile, first + rows - 1), row.first_valid);
}

}  // namespace trianglemix::cpu

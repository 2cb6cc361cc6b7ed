// The work of one call, cut into tiles: rows of a key head's query group, and keys where few tiles
// would leave threads idle. What an operator is to the kernels: a Schedule.
#pragma once

#include <cstdint>
#include <vector>

#include "tile.h"

namespace trianglemix::cpu {

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

// The tiles of a call, and the keys that each of them visits.
class Schedule {
 public:
  virtual ~Schedule() = default;
  // Writes the ranges of keys that a tile visits, disjoint and ascending; returns how many. On any
  // thread.
  virtual int64_t RangesOf(const Tile& tile, KeyRange* ranges) const = 0;

  Plan plan;
  int64_t most_ranges;  // of a tile
};

// The rows of the batch, as `pattern` sees them.
std::vector<BatchRow> DescribeRows(const AttentionProblem& problem, const Pattern& pattern);

// Appends the tiles of a batch row's tokens, of all heads. The last rows, which keep the most keys,
// come first.
void AppendTiles(const AttentionProblem& problem, int64_t b, const KeyRange& tokens, bool dense,
                 std::vector<Tile>* tiles);

// Keys that the rows of these tiles keep, each tile's counted once.
int64_t CountKeys(const AttentionProblem& problem, const std::vector<BatchRow>& batch_rows,
                  const std::vector<Tile>& tiles);

// Adds the tiles to the plan. Those that would be too large a share of all work, `total` keys, are
// cut.
void AddTiles(const AttentionProblem& problem, const std::vector<Tile>& tiles, int64_t total,
              Plan* plan);

// What the rows of a tile keep, of its `keys`: at most kPatternRanges, for Schedule::RangesOf.
constexpr int64_t kPatternRanges = 2;
int64_t PatternRanges(const AttentionProblem& problem, const BatchRow& row, const Tile& tile,
                      KeyRange* ranges);

}  // namespace trianglemix::cpu

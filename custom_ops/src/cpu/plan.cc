#include "plan.h"

namespace trianglemix::cpu {
namespace {

// A tile is cut where it would be more than this share of all work, or of fewer keys than this:
// both bound the memory of the partial results.
constexpr int64_t kLeastParts = 64;
constexpr int64_t kLeastKeys = 512;

int64_t Length(const KeyRange& range) { return range.end - range.begin; }

KeyRanges KeysOf(const AttentionProblem& p, const BatchRow& row, const Tile& tile) {
  return KeysOfTile(p, row, tile, tile.first_row, tile.rows);
}

// Cuts the tile's window range; the sinks go with the first piece.
void AddPieces(const Tile& whole, const KeyRange& window, int64_t pieces, Plan* plan) {
  const int64_t keys = Length(window);
  Tile tile = whole;
  tile.split = static_cast<int64_t>(plan->splits.size());
  plan->splits.push_back({plan->results, pieces});
  plan->results += pieces;
  for (tile.piece = 0; tile.piece < pieces; ++tile.piece) {
    tile.keys = {window.begin + keys * tile.piece / pieces,
                 window.begin + keys * (tile.piece + 1) / pieces};
    if (tile.piece == 0) tile.keys.begin = 0;
    plan->tiles.push_back(tile);
  }
}

}  // namespace

std::vector<BatchRow> DescribeRows(const AttentionProblem& p, const Pattern& pattern) {
  std::vector<BatchRow> rows;
  for (int64_t b = 0; b < p.batch; ++b)
    rows.push_back(DescribeRow(pattern, p.query_length, p.end(b), p.prompt_end(b), p.first_key(b)));
  return rows;
}

void AppendTiles(const AttentionProblem& p, int64_t b, const KeyRange& tokens, bool dense,
                 std::vector<Tile>* tiles) {
  const int64_t group = p.num_heads / p.kv_num_heads;
  const int64_t begin = tokens.begin * group, end = tokens.end * group;
  for (int64_t n = CeilDivide(end - begin, kTileRows); n-- > 0;) {
    const int64_t first = begin + n * kTileRows;
    for (int64_t g = 0; g < p.kv_num_heads; ++g) {
      Tile tile{b, g, g * group, group};
      tile.first_row = first;
      tile.rows = Smaller(kTileRows, end - first);
      tile.dense = dense;
      tiles->push_back(tile);
    }
  }
}

int64_t CountKeys(const AttentionProblem& p, const std::vector<BatchRow>& batch_rows,
                  const std::vector<Tile>& tiles) {
  int64_t total = 0;
  for (const Tile& tile : tiles) {
    const KeyRanges keys = KeysOf(p, batch_rows[tile.batch], tile);
    total += Length(keys.sink) + Length(keys.window);
  }
  return total;
}

void AddTiles(const AttentionProblem& p, const std::vector<Tile>& tiles, int64_t total,
              Plan* plan) {
  const int64_t part = Larger(kLeastKeys, CeilDivide(total, kLeastParts));
  for (Tile tile : tiles) {
    const KeyRange window = KeysOf(p, plan->batch_rows[tile.batch], tile).window;
    tile.keys = {0, window.end};
    const int64_t pieces = (Length(window) + part / 2) / part;
    if (pieces > 1)
      AddPieces(tile, window, pieces, plan);
    else
      plan->tiles.push_back(tile);
  }
}

int64_t PatternRanges(const AttentionProblem& p, const BatchRow& row, const Tile& tile,
                      KeyRange* ranges) {
  const KeyRanges keys = KeysOf(p, row, tile);
  int64_t count = 0;
  for (const KeyRange& range : {keys.sink, keys.window})
    ranges[count++] = {Larger(range.begin, tile.keys.begin), Smaller(range.end, tile.keys.end)};
  return count;
}

}  // namespace trianglemix::cpu

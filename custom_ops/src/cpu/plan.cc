#include "plan.h"

namespace trianglemix::cpu {
namespace {

// A tile is cut where it would be more than this share of all work, or of fewer keys than this:
// both bound the memory of the partial results.
constexpr int64_t kLeastParts = 64;
constexpr int64_t kLeastKeys = 512;

int64_t CountKeys(const KeyRanges& keys) {
  return keys.sink.end - keys.sink.begin + keys.window.end - keys.window.begin;
}

void DescribeRows(const AttentionProblem& p, Plan* plan) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = int64_t{p.seqlens_k[b]} + 1;
    plan->batch_rows.push_back(DescribeRow(p.pattern, p.query_length, end,
                                           p.prompt_length != nullptr ? p.prompt_length[b] : end,
                                           p.first_valid != nullptr ? p.first_valid[b] : 0));
  }
}

// Appends the tiles of the row's dense or streaming tokens, the last rows (which keep the most
// keys) first.
void AppendTiles(const AttentionProblem& p, int64_t b, const BatchRow& row, bool dense,
                 std::vector<Tile>* tiles) {
  const int64_t group = p.num_heads / p.kv_num_heads;
  const int64_t begin = (dense ? row.dense_token : row.first_token) * group;
  const int64_t end = (dense ? row.end_token : row.dense_token) * group;
  for (int64_t n = CeilDivide(end - begin, kTileRows); n-- > 0;) {
    const int64_t first = begin + n * kTileRows;
    for (int64_t g = 0; g < p.kv_num_heads; ++g)
      tiles->push_back({b, g, first, Smaller(kTileRows, end - first), dense, {}, -1, 0});
  }
}

// Cuts the tile's window range; the sinks go with the first piece.
void AppendPieces(const Tile& whole, const KeyRange& window, int64_t pieces, Plan* plan) {
  const int64_t keys = window.end - window.begin;
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

Plan MakePlan(const AttentionProblem& p) {
  Plan plan;
  DescribeRows(p, &plan);
  std::vector<Tile> whole;
  for (bool dense : {true, false})
    for (int64_t b = 0; b < p.batch; ++b) AppendTiles(p, b, plan.batch_rows[b], dense, &whole);
  int64_t total = 0;
  const auto keys_of = [&](const Tile& tile) {
    return KeysOfTile(p, plan.batch_rows[tile.batch], tile, tile.first_row, tile.rows);
  };
  for (const Tile& tile : whole) total += CountKeys(keys_of(tile));
  const int64_t part = Larger(kLeastKeys, CeilDivide(total, kLeastParts));
  for (Tile& tile : whole) {
    const KeyRanges keys = keys_of(tile);
    tile.keys = {0, keys.window.end};
    const int64_t pieces = (keys.window.end - keys.window.begin + part / 2) / part;
    if (pieces > 1)
      AppendPieces(tile, keys.window, pieces, &plan);
    else
      plan.tiles.push_back(tile);
  }
  return plan;
}

}  // namespace trianglemix::cpu

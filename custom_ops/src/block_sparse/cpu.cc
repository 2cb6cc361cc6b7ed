#include "cpu.h"

#include <algorithm>

#include "../cpu/append.h"
#include "kept_blocks.h"
#include "sampling.h"

namespace trianglemix::cpu {
namespace {

constexpr Pattern kDense = {0, kDenseWindow, 1};

// A sparse tile is one head's; all other tokens are tiles of the dense mode.
class BlockSparseSchedule final : public Schedule {
 public:
  BlockSparseSchedule(const AttentionProblem& problem, const std::vector<TiledRow>& rows,
                      const KeptBlocks& kept)
      : problem_(problem), rows_(rows), kept_(kept) {
    most_ranges = CeilDivide(problem.present_capacity, 2 * kBlock) + kPatternRanges;
    plan.batch_rows = DescribeRows(problem, kDense);
    std::vector<Tile> dense, sparse;
    int64_t blocks = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
      AppendDense(b, &dense);
      AppendSparse(b, &sparse, &blocks);
    }
    AddTiles(problem, dense, CountKeys(problem, plan.batch_rows, dense) + blocks * kBlock, &plan);
    std::stable_sort(sparse.begin(), sparse.end(), [&](const Tile& a, const Tile& b) {
      return kept.Count(a.choice) > kept.Count(b.choice);
    });
    plan.tiles.insert(plan.tiles.end(), sparse.begin(), sparse.end());
  }

  int64_t RangesOf(const Tile& tile, KeyRange* ranges) const override {
    const BatchRow& row = plan.batch_rows[tile.batch];
    if (tile.choice < 0) return PatternRanges(problem_, row, tile, ranges);
    const int64_t own = (row.start + tile.first_token - row.first_valid) / kBlock;
    const int64_t count = kept_.Runs(tile.choice, own, ranges);
    for (int64_t i = 0; i < count; ++i)
      ranges[i] = {row.first_valid + kBlock * ranges[i].begin,
                   Smaller(row.first_valid + kBlock * ranges[i].end, tile.keys.end)};
    return count;
  }

 private:
  // Tokens of the call that sparse tiles hold.
  KeyRange SparseTokens(int64_t b) const {
    const TiledRow& row = rows_[b];
    const auto token = [&](int64_t tile) {
      return Clamp(row.first_slot(tile) - row.start, row.first_token, row.end_token);
    };
    return {token(row.sparse_begin), token(row.sparse_end)};
  }

  void AppendDense(int64_t b, std::vector<Tile>* tiles) const {
    const KeyRange sparse = SparseTokens(b);
    AppendTiles(problem_, b, {sparse.end, rows_[b].end_token}, true, tiles);
    AppendTiles(problem_, b, {rows_[b].first_token, sparse.begin}, true, tiles);
  }

  // Adds the kept blocks to `blocks`.
  void AppendSparse(int64_t b, std::vector<Tile>* tiles, int64_t* blocks) const {
    const TiledRow& row = rows_[b];
    const int64_t group = problem_.num_heads / problem_.kv_num_heads;
    for (int64_t t = row.sparse_end; t-- > row.sparse_begin;)
      for (int64_t h = 0; h < problem_.num_heads; ++h) {
        const int64_t first = row.first_slot(t), end = Smaller(first + kBlock, row.end);
        Tile tile{b, h / group, h, 1};
        tile.first_token = first - row.start;
        tile.rows = end - first;
        tile.keys = {0, end};
        tile.choice = kept_.IndexOf(b, h, t);
        tiles->push_back(tile);
        *blocks += kept_.Count(tile.choice);
      }
  }

  const AttentionProblem& problem_;
  const std::vector<TiledRow>& rows_;
  const KeptBlocks& kept_;
};

}  // namespace

const char* RunBlockSparse(const BlockSparseProblem& problem, ParallelFor& pool) {
  if (const char* message = Append(problem, pool)) return message;
  const AttentionProblem ready = Appended(problem);
  const std::vector<TiledRow> rows = DescribeTiles(problem);
  KeptBlocks kept(problem, rows);
  if (const char* message = ChooseBlocks(ready, problem, rows, pool, &kept)) return message;
  if (problem.block_mask != nullptr) WriteMask(problem, rows, kept);
  return Attend(ready, BlockSparseSchedule(ready, rows, kept), pool);
}

}  // namespace trianglemix::cpu

#include "kept_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

namespace trianglemix {

std::vector<TiledRow> DescribeTiles(const BlockSparseProblem& p) {
  std::vector<TiledRow> rows;
  for (int64_t b = 0; b < p.batch; ++b)
    rows.push_back(
        DescribeTiles(p.rule(), p.query_length, p.end(b), p.prompt_end(b), p.first_key(b)));
  return rows;
}

float Threshold(const float* sums, int64_t count, float mass, float* sorted) {
  double whole = 0;
  for (int64_t i = 0; i < count; ++i) whole += sums[i];
  if (std::isnan(whole)) return NAN;  // no order, for the sort
  std::copy(sums, sums + count, sorted);
  std::sort(sorted, sorted + count, std::greater<float>());
  double reached = 0;
  for (int64_t i = 0; i < count; ++i) {
    reached += sorted[i];
    if (reached >= mass * whole) return sorted[i];
  }
  return sorted[count - 1];
}

KeptBlocks::KeptBlocks(const BlockSparseProblem& problem, const std::vector<TiledRow>& rows)
    : problem_(problem),
      tiles_(CeilDivide(problem.present_capacity, kBlock)),
      words_(CeilDivide(tiles_, 64)) {
  const auto is_sparse = [](const TiledRow& row) { return row.sparse_begin < row.sparse_end; };
  if (std::any_of(rows.begin(), rows.end(), is_sparse))
    bits_.resize(problem.batch * problem.num_heads * tiles_ * words_);
}

int64_t KeptBlocks::IndexOf(int64_t batch, int64_t head, int64_t tile) const {
  return (batch * problem_.num_heads + head) * tiles_ + tile;
}

void KeptBlocks::Choose(int64_t index, int64_t tile, const float* sums, float* sorted) {
  uint64_t* bits = bits_.data() + index * words_;
  const float least = sums != nullptr ? Threshold(sums, tile + 1, problem_.mass, sorted) : 0.0f;
  for (int64_t block = 0; block <= tile; ++block)
    if (sums == nullptr || sums[block] >= least || IsForced(problem_.pattern, tile, block))
      bits[block / 64] |= uint64_t{1} << (block % 64);
}

int64_t KeptBlocks::Count(int64_t index) const {
  int64_t count = 0;
  for (int64_t i = 0; i < words_; ++i) count += __builtin_popcountll(bits_[index * words_ + i]);
  return count;
}

int64_t KeptBlocks::Runs(int64_t index, int64_t tile, KeyRange* runs) const {
  int64_t count = 0;
  for (int64_t block = 0; block <= tile; ++block) {
    if (!IsKept(index, block)) continue;
    if (count > 0 && runs[count - 1].end == block)
      ++runs[count - 1].end;
    else
      runs[count++] = {block, block + 1};
  }
  return count;
}

void WriteMask(const BlockSparseProblem& p, const std::vector<TiledRow>& rows,
               const KeptBlocks& kept) {
  const int64_t tiles = CeilDivide(p.present_capacity, kBlock);
  std::memset(p.block_mask, 0, p.batch * p.num_heads * tiles * tiles);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.num_heads; ++h)
      for (int64_t t = rows[b].begin; t < rows[b].end_tile; ++t) {
        const int64_t index = kept.IndexOf(b, h, t);
        uint8_t* mask = p.block_mask + index * tiles;
        for (int64_t block = 0; block <= t; ++block)
          mask[block] = !rows[b].is_sparse(t) || kept.IsKept(index, block);
      }
}

}  // namespace trianglemix

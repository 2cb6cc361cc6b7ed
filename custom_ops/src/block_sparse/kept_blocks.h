// Which blocks the sparse tiles of a call keep, a bit for each.
#pragma once

#include <vector>

#include "problem.h"
#include "rule.h"

namespace trianglemix {

// The rows of a call as tiles. The lengths must be in host memory.
std::vector<TiledRow> DescribeTiles(const BlockSparseProblem& problem);

// The largest number so that the sums that are at least as large make up `mass` of the whole. NaN
// where the sums are. `sorted` has room for as many numbers.
float Threshold(const float* sums, int64_t count, float mass, float* sorted);

// Bits of each head's tiles [sparse_begin, sparse_end) of a row. Different tiles may be written and
// read by different threads.
class KeptBlocks {
 public:
  KeptBlocks(const BlockSparseProblem& problem, const std::vector<TiledRow>& rows);

  // The tile's index, for the functions below.
  int64_t IndexOf(int64_t batch, int64_t head, int64_t tile) const;

  // Keeps what the rule says: `sums` [tile + 1]; null where every block is kept.
  void Choose(int64_t index, int64_t tile, const float* sums, float* sorted);

  bool IsKept(int64_t index, int64_t block) const {
    return bits_[index * words_ + block / 64] >> (block % 64) & 1;
  }
  int64_t Count(int64_t index) const;

  // Writes the blocks of a tile as ranges of blocks, those beside each other as one; returns how
  // many.
  int64_t Runs(int64_t index, int64_t tile, KeyRange* runs) const;

 private:
  const BlockSparseProblem& problem_;
  const int64_t tiles_;  // of a row, and its blocks
  const int64_t words_;  // of a tile
  std::vector<uint64_t> bits_;
};

// Fills problem.block_mask.
void WriteMask(const BlockSparseProblem& problem, const std::vector<TiledRow>& rows,
               const KeptBlocks& kept);

}  // namespace trianglemix

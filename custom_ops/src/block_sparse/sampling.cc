#include "sampling.h"

#include "../cpu/attend.h"

namespace trianglemix::cpu {
namespace {

// Heads of which one sample is taken: a tile has room for 8 rows of each.
constexpr int64_t kMostHeads = kMostTileRows / kSamples;

// Some tiles of some heads of a group, whose sampled rows visit the keys together.
struct Sample {
  Tile rows;
  int64_t first_tile;
  int64_t tiles;
};

// How many tiles' rows fill panels best, of those that have room.
int64_t TilesTogether(int64_t heads, int64_t panel_rows) {
  const auto lanes = [&](int64_t tiles) {
    return CeilDivide(tiles * heads * kSamples, panel_rows) * panel_rows;
  };
  int64_t best = 1;
  for (int64_t tiles = 2; tiles * heads <= kMostHeads; ++tiles)
    if (lanes(tiles) * best <= lanes(best) * tiles) best = tiles;
  return best;
}

// The first tile that has a block to choose: all before keep theirs as sinks or window.
int64_t FirstChoice(const Pattern& pattern, const TiledRow& row) {
  int64_t tile = row.sparse_begin;
  const auto has_choice = [&] {
    for (int64_t block = 0; block <= tile; ++block)
      if (!IsForced(pattern, tile, block)) return true;
    return false;
  };
  while (tile < row.sparse_end && !has_choice()) ++tile;
  return tile;
}

class Samples final : public Workers {
 public:
  Samples(const AttentionProblem& queries, std::vector<Sample> samples, KeptBlocks* kept)
      : Workers(samples.size(), ScratchFloats(queries)),
        queries_(queries),
        batch_rows_(DescribeRows(queries, kDense)),
        samples_(std::move(samples)),
        kept_(kept) {}

 private:
  static constexpr Pattern kDense = {0, kDenseWindow, 1};

  // The kernel's, the sums of each head and tile, and room to sort one's.
  static size_t ScratchFloats(const AttentionProblem& p) {
    const int64_t blocks = CeilDivide(p.present_capacity, kBlock);
    return ChooseVariant().sums_scratch_floats(p, blocks) + (kMostHeads + 1) * blocks;
  }

  void Compute(size_t index, float* scratch) override {
    const Sample& sample = samples_[index];
    const Tile& rows = sample.rows;
    const int64_t blocks = sample.first_tile + sample.tiles;
    float* sums = scratch + ChooseVariant().sums_scratch_floats(queries_, blocks);
    float* sorted = sums + kMostHeads * blocks;
    ChooseVariant().sum_blocks(
        {queries_, batch_rows_[rows.batch], rows, kSamples, kBlock, blocks, scratch, sums});
    for (int64_t t = 0; t < sample.tiles; ++t)
      for (int64_t h = 0; h < rows.heads; ++h) {
        const int64_t tile = sample.first_tile + t;
        kept_->Choose(kept_->IndexOf(rows.batch, rows.first_head + h, tile), tile,
                      sums + (t * rows.heads + h) * blocks, sorted);
      }
  }

  const AttentionProblem& queries_;
  const std::vector<BatchRow> batch_rows_;
  const std::vector<Sample> samples_;
  KeptBlocks* kept_;
};

// The sampled rows of tiles [first_tile, first_tile + tiles) of some heads.
Sample MakeSample(const TiledRow& row, const Tile& heads, int64_t first_tile, int64_t tiles) {
  Sample sample{heads, first_tile, tiles};
  const int64_t first = row.first_slot(first_tile) + kSampleStep - 1;
  const int64_t end = Smaller(row.first_slot(first_tile + tiles), row.sampled_end);
  sample.rows.first_token = first - row.start;
  sample.rows.rows = CeilDivide(end - first, kSampleStep) * heads.heads;
  return sample;
}

void AppendSamples(const AttentionProblem& p, const TiledRow& row, int64_t first_tile, Tile heads,
                   std::vector<Sample>* samples) {
  const int64_t together = TilesTogether(heads.heads, ChooseVariant().panel_rows);
  for (int64_t n = CeilDivide(row.sparse_end - first_tile, together); n-- > 0;) {
    const int64_t tile = first_tile + n * together;
    const int64_t tiles = Smaller(together, row.sparse_end - tile);
    for (heads.kv_head = 0; heads.kv_head < p.kv_num_heads; ++heads.kv_head) {
      Tile own = heads;
      own.first_head += heads.kv_head * (p.num_heads / p.kv_num_heads);
      samples->push_back(MakeSample(row, own, tile, tiles));
    }
  }
}

}  // namespace

const char* ChooseBlocks(const AttentionProblem& queries, const BlockSparseProblem& problem,
                         const std::vector<TiledRow>& rows, ParallelFor& pool, KeptBlocks* kept) {
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  std::vector<Sample> samples;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t first = FirstChoice(problem.pattern, rows[b]);
    for (int64_t h = 0; h < problem.num_heads; ++h)
      for (int64_t tile = rows[b].sparse_begin; tile < first; ++tile)
        kept->Choose(kept->IndexOf(b, h, tile), tile, nullptr, nullptr);
    for (int64_t h = 0; h < group; h += kMostHeads) {
      Tile heads{b, 0, h, Smaller(kMostHeads, group - h)};
      heads.step = kSampleStep;
      AppendSamples(problem, rows[b], first, heads, &samples);
    }
  }
  return Samples(queries, std::move(samples), kept).Run(pool);
}

}  // namespace trianglemix::cpu

#include "cpu.h"

#include "../cpu/append.h"

namespace trianglemix::cpu {

TriangleSchedule::TriangleSchedule(const AttentionProblem& problem) : problem_(problem) {
  most_ranges = kPatternRanges;
  plan.batch_rows = DescribeRows(problem, problem.pattern);
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const BatchRow& row = plan.batch_rows[b];
    AppendTiles(problem, b, {row.dense_token, row.end_token}, true, &tiles);
  }
  for (int64_t b = 0; b < problem.batch; ++b) {
    const BatchRow& row = plan.batch_rows[b];
    AppendTiles(problem, b, {row.first_token, row.dense_token}, false, &tiles);
  }
  AddTiles(problem, tiles, CountKeys(problem, plan.batch_rows, tiles), &plan);
}

int64_t TriangleSchedule::RangesOf(const Tile& tile, KeyRange* ranges) const {
  return PatternRanges(problem_, plan.batch_rows[tile.batch], tile, ranges);
}

const char* RunTriangle(const AttentionProblem& problem, ParallelFor& pool) {
  if (const char* message = Append(problem, pool)) return message;
  const AttentionProblem ready = Appended(problem);
  return Attend(ready, TriangleSchedule(ready), pool);
}

}  // namespace trianglemix::cpu

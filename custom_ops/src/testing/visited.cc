// What the CPU kernel's plan visits, for tests and benchmarks: no part of the released library.
#include "../cpu/attend.h"
#include "../triangle/cpu.h"

namespace trianglemix::cpu {
namespace {

int64_t CountPairs(const AttentionProblem& problem) {
  const TriangleSchedule schedule(problem);
  const Plan& plan = schedule.plan;
  const int64_t panel = ChooseVariant().panel_rows;
  int64_t pairs = 0;
  for (const Tile& tile : plan.tiles)
    for (int64_t first = 0; first < tile.rows; first += panel) {
      const KeyRanges keys = KeysOfTile(problem, plan.batch_rows[tile.batch], tile,
                                        tile.first_row + first, Smaller(panel, tile.rows - first));
      for (const KeyRange& range : {keys.sink, keys.window})
        pairs += panel * Larger(0, Smaller(range.end, tile.keys.end) -
                                       Larger(range.begin, tile.keys.begin));
    }
  return pairs;
}

}  // namespace
}  // namespace trianglemix::cpu

// Pairs of a row and a key whose score is computed for a whole prompt of `length` tokens.
extern "C" __attribute__((visibility("default"))) int64_t
trianglemix_visited_pairs(int64_t num_heads, int64_t kv_num_heads, int64_t length, int64_t sink,
                          int64_t window, int64_t last) {
  trianglemix::AttentionProblem problem{};
  const int32_t last_key = static_cast<int32_t>(length - 1);
  problem.pattern = {sink, window, last};
  problem.batch = 1;
  problem.query_length = problem.total = problem.present_capacity = length;
  problem.num_heads = num_heads;
  problem.kv_num_heads = kv_num_heads;
  problem.seqlens_k = &last_key;
  return trianglemix::cpu::CountPairs(problem);
}

// The instruction set of this library's kernel.
extern "C" __attribute__((visibility("default"))) const char* trianglemix_variant() {
  return trianglemix::cpu::ChooseVariant().name;
}

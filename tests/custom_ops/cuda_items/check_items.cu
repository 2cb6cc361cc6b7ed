// Checks on the host, for random sizes and lengths, that the CUDA kernels' work items visit every
// row of every head once, and every block that it keeps. Prints what is wrong, or nothing.
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "block_sparse/cuda/choice.h"

using namespace trianglemix;

namespace {

std::mt19937 random_bits(0);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

constexpr Device kDevice{132, 90};
using Rows = std::map<std::tuple<int, int, int>, int>;  // batch row, head or group, token: visits

struct Call {
  BlockSparseProblem problem{};
  std::vector<int32_t> last_keys, first_valid;
  Kernel kernel;

  Call() {
    constexpr Kernel kKernels[] = {Kernel::kSm90, Kernel::kSm80, Kernel::kFloat32};
    kernel = kKernels[pick(0, 2)];
    problem.dtype = kernel == Kernel::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    problem.kv_num_heads = pick(1, 4);
    problem.num_heads = problem.kv_num_heads * pick(1, 8);
    problem.head_size = problem.value_head_size = pick(0, 1) ? 128 : 256;
    problem.batch = pick(1, 3);
    problem.query_length = pick(0, 1) ? pick(16, 300) : pick(16, 3000);
    problem.present_capacity = problem.total = problem.query_length + pick(0, 5000);
    problem.scale = 1.0f;
    problem.mass = 0.9f;
    problem.pattern = {8, pick(0, 1) ? kDenseWindow : 512, 128};
    for (int b = 0; b < problem.batch; ++b) {
      last_keys.push_back(pick(-1, static_cast<int>(problem.total) - 1));
      first_valid.push_back(pick(0, 3) ? 0 : pick(0, last_keys.back() + 1));
    }
  }
  Lengths lengths() const { return {last_keys.data(), nullptr, first_valid.data()}; }
};

bool visits_once(const Rows& rows, int b, int head, int token) {
  const auto found = rows.find({b, head, token});
  if (found != rows.end() && found->second == 1) return true;
  std::printf("token %d of batch row %d, head or group %d: %d visits\n", token, b, head,
              found == rows.end() ? 0 : found->second);
  return false;
}

bool ranges_visit_each_row(const Call& call) {
  Plan plan = make_plan(call.problem, call.kernel, kDevice);
  if (pick(0, 1)) plan.wave = pick(1, plan.batch * plan.groups);
  Rows rows;
  for (int number = 0; number < plan.items; ++number) {
    Item item;
    if (!find_item(item, plan, call.lengths(), number) || item.split != 0) continue;
    for (int r = 0; r < item.rows; ++r) ++rows[{item.b, item.group, item.row + r}];
  }
  for (int b = 0; b < plan.batch; ++b) {
    const RowRange range = row_range(plan, call.lengths(), b);
    for (int group = 0; group < plan.groups; ++group) {
      for (int token = 0; token < range.rows; ++token) {
        if (!visits_once(rows, b, group, token)) return false;
      }
    }
  }
  return true;
}

// The items of one tile of a head, which keeps `kept` blocks.
bool shares_are_the_kept(const ChoicePlan& plan, const TiledRow& row, int b, int head, int tile,
                         Rows& rows) {
  const int number = tile_number(plan, b, head, tile - static_cast<int>(row.begin));
  const int items = plan.tile_items * plan.splits, kept = pick(1, tile + 1);
  std::map<int, int> blocks, diagonals;  // of a part
  for (int i = number * items; i < (number + 1) * items; ++i) {
    const Item item = block_item(plan, row, b, head, tile, kept, i);
    const int part = i % items / plan.splits;
    if (item.rows == 0 && item.skipped == 0) continue;
    const bool follows = item.skipped == blocks[part] && item.blocks >= 0 && item.bits == number;
    if (!follows) return std::printf("share %d of tile %d: wrong blocks\n", i, tile), false;
    blocks[part] += item.blocks;
    if (item.high == item.low) continue;
    ++blocks[part], ++diagonals[part];
    for (int r = 0; r < item.rows; ++r) ++rows[{b, head, item.row + r}];
  }
  for (const auto& [part, count] : blocks) {
    if (count == kept && diagonals[part] == 1) continue;
    std::printf("tile %d keeps %d blocks, its items %d\n", tile, kept, count);
    return false;
  }
  return true;
}

bool blocks_visit_each_row(const Call& call) {
  Plan attention = make_block_plan(call.problem, call.kernel, kDevice);
  if (pick(0, 1)) attention.splits = pick(1, 16);
  const ChoicePlan plan = make_choice_plan(call.problem, call.kernel, attention, kDevice);
  std::set<int> numbers;
  Rows rows;
  for (int b = 0; b < plan.batch; ++b) {
    const TiledRow row = tiled_row(plan, call.lengths(), b);
    for (int head = 0; head < plan.heads; ++head) {
      for (int nth = 0; nth < plan.row_tiles; ++nth) {
        numbers.insert(tile_number(plan, b, head, nth));
        const int tile = static_cast<int>(row.begin) + nth;
        if (tile >= row.end_tile) continue;
        if (!shares_are_the_kept(plan, row, b, head, tile, rows)) return false;
      }
      for (int token = row.first_token; token < row.end_token; ++token) {
        if (!visits_once(rows, b, head, token)) return false;
      }
    }
  }
  const int tiles = plan.row_tiles * plan.batch * plan.heads;
  const bool whole = static_cast<int>(numbers.size()) == tiles && *numbers.begin() == 0 &&
                     *numbers.rbegin() == tiles - 1;
  if (!whole) std::printf("the numbers of %d tiles are not those from 0 on\n", tiles);
  return whole;
}

}  // namespace

int main() {
  for (int trial = 0; trial < 200; ++trial) {
    const Call call;
    if (!ranges_visit_each_row(call) || !blocks_visit_each_row(call)) return 1;
  }
}

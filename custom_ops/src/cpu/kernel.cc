#include "kernel.h"

#include <cstring>
#include <vector>

#include "attend.h"

namespace trianglemix::cpu {
namespace {

constexpr size_t kAlignment = 64;
// More than any pool has threads; an index that finds the work taken returns at once.
constexpr size_t kMostWorkers = 256;
constexpr const char* kOutOfMemory = "out of memory for the attention's scratch";

// Tokens past their row's end, and left pads, keep no key.
void ClearDeadTokens(const AttentionProblem& p, const std::vector<BatchRow>& rows) {
  const size_t token = p.num_heads * p.value_head_size * BytesOf(p.dtype);
  for (int64_t b = 0; b < p.batch; ++b) {
    char* output = static_cast<char*>(p.output) + b * p.query_length * token;
    std::memset(output, 0, rows[b].first_token * token);
    std::memset(output + rows[b].end_token * token, 0,
                (p.query_length - rows[b].end_token) * token);
  }
}

// Floats that hold the ranges of keys that a tile visits.
size_t RangeFloats(int64_t ranges) { return ranges * (sizeof(KeyRange) / sizeof(float)); }

// The tiles of a call. Scratch: the ranges, the state of a tile that is not split, the kernel's.
class Tiles final : public Workers {
 public:
  Tiles(const AttentionProblem& problem, const Schedule& schedule, const Variant& variant)
      : Workers(schedule.plan.tiles.size(),
                RangeFloats(schedule.most_ranges) +
                    Padded(variant.state_floats(problem, kMostTileRows)) +
                    variant.scratch_floats(problem)),
        problem_(problem),
        schedule_(schedule),
        variant_(variant),
        piece_floats_(variant.state_floats(problem, kTileRows)),
        own_floats_(Padded(variant.state_floats(problem, kMostTileRows))),
        partials_(Allocate(schedule.plan.results * piece_floats_)),
        pieces_left_(schedule.plan.splits.size()) {
    for (size_t i = 0; i < pieces_left_.size(); ++i)
      pieces_left_[i] = schedule.plan.splits[i].pieces;
  }

  bool has_memory() const { return partials_ != nullptr; }

 private:
  static size_t Padded(size_t floats) {
    constexpr size_t step = kAlignment / sizeof(float);
    return CeilDivide(floats, step) * step;
  }

  void Compute(size_t index, float* scratch) override {
    const Plan& plan = schedule_.plan;
    const Tile& tile = plan.tiles[index];
    float* own_state = scratch;
    float* own_scratch = own_state + own_floats_;
    auto* ranges = reinterpret_cast<KeyRange*>(own_scratch + variant_.scratch_floats(problem_));
    const int64_t count = schedule_.RangesOf(tile, ranges);
    TileCall call{
        problem_, plan.batch_rows[tile.batch], tile, ranges, count, own_scratch, own_state, 0};
    if (tile.split < 0) return variant_.run(call);
    const Split& split = plan.splits[tile.split];
    float* states = partials_.get() + split.first_result * piece_floats_;
    call.state = states + tile.piece * piece_floats_;
    variant_.run(call);
    // The thread that finishes the last piece merges them, in the order of the keys.
    if (--pieces_left_[tile.split] > 0) return;
    call.state = states;
    call.merged_pieces = split.pieces;
    variant_.run(call);
  }

  const AttentionProblem& problem_;
  const Schedule& schedule_;
  const Variant& variant_;
  const size_t piece_floats_;
  const size_t own_floats_;
  const Floats partials_;
  std::vector<std::atomic<int64_t>> pieces_left_;
};

}  // namespace

Floats Allocate(size_t floats) {
  const size_t bytes =
      CeilDivide(Larger(floats, size_t{1}) * sizeof(float), kAlignment) * kAlignment;
  return Floats(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
}

const char* Workers::Run(ParallelFor& pool) {
  const auto body = [](void* argument, size_t) { static_cast<Workers*>(argument)->Take(); };
  if (count_ > 0)
    if (const char* message = pool.Run(Smaller(count_, kMostWorkers), body, this)) return message;
  return out_of_memory_ ? kOutOfMemory : nullptr;
}

// Never throws: ONNX Runtime's pool could not pass it on.
void Workers::Take() noexcept {
  Floats scratch;
  for (size_t i = next_++; i < count_; i = next_++) {
    if (scratch == nullptr) scratch = Allocate(scratch_floats_);
    if (scratch == nullptr) {
      out_of_memory_ = true;
      return;
    }
    Compute(i, scratch.get());
  }
}

const char* Attend(const AttentionProblem& problem, const Schedule& schedule, ParallelFor& pool) {
  ClearDeadTokens(problem, schedule.plan.batch_rows);
  Tiles tiles(problem, schedule, ChooseVariant());
  return tiles.has_memory() ? tiles.Run(pool) : kOutOfMemory;
}

}  // namespace trianglemix::cpu

// A vector core's half of attention: the online softmax of its rows of a tile, and the sum of the
// products. Each of the two vector cores of a cube core takes half of a tile's rows.
// Never compiled by CANN.
#pragma once

#include "triangle_attention_cache.h"
#include "triangle_attention_call.h"

namespace triangle {

// Scores that are not kept, and the peak of a row that has seen none: their difference is so large
// that a dropped score weighs exactly zero, whatever the row's peak.
constexpr float kDroppedScore = -1.0e30f;
constexpr float kNoPeak = -1.0e20f;
// tanh is 1 in float32 from here on, and exp does not overflow.
constexpr float kTanhLimit = 40.0f;

// Row strides in 32-byte blocks.
constexpr uint8_t kLaneBlocks = kLanes * sizeof(float) / 32;
constexpr uint8_t kScoreBlocks = kBlockKeys * sizeof(float) / 32;

// Every method ends with a barrier, so that the next may use what it made.
template <typename T>
class VectorCore {
 public:
  __aicore__ inline VectorCore(const Call<T>& call, AscendC::TPipe& pipe)
      : call_(call), cache_(call, pipe) {
    const int64_t rows = call.data.tileRows / 2;
    const int64_t width = Larger(kBlockKeys, call.data.valueSize);
    pipe.InitBuffer(scores_, 2, rows * kBlockKeys * sizeof(float));
    pipe.InitBuffer(products_, 1, rows * call.data.valueSize * sizeof(float));
    pipe.InitBuffer(narrow_, 1, rows * width * sizeof(T));
    pipe.InitBuffer(sums_, rows * call.data.valueSize * sizeof(float));
    pipe.InitBuffer(halves_, rows * kLanes * sizeof(float));
    pipe.InitBuffer(rowState_, kStateVectors * kLanes * sizeof(float));
    pipe.InitBuffer(spread_, (1 + kScoreSlots) * kSpread * sizeof(float));
    sum_ = sums_.template Get<float>();
    half_ = halves_.template Get<float>();
    AscendC::LocalTensor<float> state = rowState_.template Get<float>();
    peak_ = state;
    newPeak_ = state[kLanes];
    decay_ = state[2 * kLanes];
    total_ = state[3 * kLanes];
    tilePeak_ = state[4 * kLanes];
    tileTotal_ = state[5 * kLanes];
    AscendC::Duplicate(state, 0.0f, kStateVectors * kLanes);
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Process() {
    cache_.Append();
    ZeroDeadTokens();
    call_.ForEachTask(*this);
  }

  __aicore__ inline void Run(const Task& task) {
    const int64_t half = CeilDivide(task.rows, 2);
    first_ = AscendC::GetSubBlockIdx() * half;
    rows_ = Clamp(task.rows - first_, 0, half);
    Reset();
    for (int64_t index = 0; index < task.blocks; ++index) {
      AscendC::CrossCoreWaitFlag(kScoresReady);
      if (rows_ > 0) MakeWeights(task, BlockAt(task.keys, index));
      ++step_;
      AscendC::CrossCoreSetFlag<kGroupSync, PIPE_MTE3>(kWeightsReady);
      if (index > 0) AddProducts(step_ - 2);
    }
    AddProducts(step_ - 1);
    if (rows_ > 0) StoreOutput(task);
  }

 private:
  __aicore__ inline void Reset() {
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Duplicate(peak_, kNoPeak, kLanes);
    AscendC::Duplicate(total_, 0.0f, kLanes);
    if (rows_ > 0) AscendC::Duplicate(sum_, 0.0f, rows_ * call_.data.valueSize);
    AscendC::PipeBarrier<PIPE_V>();
  }

  // ------------------------------------------------------------------------------ weights

  __aicore__ inline void MakeWeights(const Task& task, const KeyBlock& block) {
    AscendC::LocalTensor<float> scores = LoadScores(block);
    for (int64_t chunk = 0; chunk * kLanes < block.count; ++chunk) {
      const int64_t lanes = RoundUp(block.count - chunk * kLanes, kFractal);
      ScaleScores(scores[chunk * kLanes], Smaller(kLanes, lanes));
    }
    if (!FullyKept(call_.data, task.row, task.tile, block)) DropScores(task, block, scores);
    UpdatePeaks(scores);
    Exponentiate(scores);
    UpdateTotals(scores);
    StoreWeights(scores);
    scores_.FreeTensor(scores);
  }

  // Columns from the block's end on, rounded up to a fractal, are not loaded; DropScores sets them.
  __aicore__ inline AscendC::LocalTensor<float> LoadScores(const KeyBlock& block) {
    const int64_t blocks = RoundUp(block.count, kFractal) * sizeof(float) / 32;
    AscendC::LocalTensor<float> scores = scores_.template AllocTensor<float>();
    AscendC::DataCopyParams copy;
    copy.blockCount = rows_;
    copy.blockLen = blocks;
    copy.srcStride = kScoreBlocks - blocks;
    copy.dstStride = kScoreBlocks - blocks;
    AscendC::DataCopy(scores, call_.scores[call_.ScoresAt(step_) + first_ * kBlockKeys], copy);
    scores_.EnQue(scores);
    return scores_.template DeQue<float>();
  }

  // Of up to kLanes columns of every row: scale, then softcap * tanh(x / softcap) as
  // (e^2y - 1) / (e^2y + 1).
  __aicore__ inline void ScaleScores(const AscendC::LocalTensor<float>& x, uint64_t lanes) {
    const uint8_t rows = rows_;
    const float cap = call_.data.softcap;
    const AscendC::UnaryRepeatParams same(1, 1, kScoreBlocks, kScoreBlocks);
    if (cap == 0.0f) {
      AscendC::Muls(x, x, call_.data.scale, lanes, rows, same);
      AscendC::PipeBarrier<PIPE_V>();
      return;
    }
    const AscendC::UnaryRepeatParams aside(1, 1, kLaneBlocks, kScoreBlocks);
    const AscendC::BinaryRepeatParams ratio(1, 1, 1, kScoreBlocks, kScoreBlocks, kLaneBlocks);
    AscendC::Muls(x, x, 2.0f * call_.data.scale / cap, lanes, rows, same);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Mins(x, x, kTanhLimit, lanes, rows, same);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Maxs(x, x, -kTanhLimit, lanes, rows, same);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Exp(x, x, lanes, rows, same);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(half_, x, 1.0f, lanes, rows, aside);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(x, x, -1.0f, lanes, rows, same);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Div(x, x, half_, lanes, rows, ratio);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Muls(x, x, cap, lanes, rows, same);
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Rows of one token share what they keep: one instruction sets them all.
  __aicore__ inline void DropScores(const Task& task, const KeyBlock& block,
                                    const AscendC::LocalTensor<float>& scores) {
    const int64_t group = call_.data.groupHeads;
    for (int64_t row = 0; row < rows_;) {
      const int64_t token = (first_ + row) / group;
      const int64_t end = Smaller(rows_, (token + 1) * group - first_);
      const int64_t position = task.row.start + task.tile.firstToken + token;
      for (int64_t chunk = 0; chunk < kBlockKeys / kLanes; ++chunk) {
        uint64_t mask[2] = {
            DroppedLanes(call_.data, task.row, task.tile.dense, position, block, chunk), 0};
        if (mask[0] == 0) continue;
        AscendC::Duplicate(scores[row * kBlockKeys + chunk * kLanes], kDroppedScore, mask,
                           static_cast<uint8_t>(end - row), 1, kScoreBlocks);
      }
      row = end;
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // newPeak = max(peak, the block's peak); decay = e^(peak - newPeak).
  __aicore__ inline void UpdatePeaks(const AscendC::LocalTensor<float>& scores) {
    const AscendC::BinaryRepeatParams fold(1, 1, 1, kLaneBlocks, kScoreBlocks, kScoreBlocks);
    AscendC::Max(half_, scores, scores[kLanes], kLanes, rows_, fold);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::WholeReduceMax<float>(tilePeak_, half_, kLanes, rows_, 1, 1, kLaneBlocks,
                                   AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Max(newPeak_, peak_, tilePeak_, kLanes);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Sub(decay_, peak_, newPeak_, kLanes);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Exp(decay_, decay_, kLanes);
    AscendC::Adds(peak_, newPeak_, 0.0f, kLanes);
    AscendC::PipeBarrier<PIPE_V>();
  }

  // A value of each row, repeated over a 32-byte block, so that an instruction can pair it with a
  // row. Slot 0 is for values used at once; decays wait in 1 and 2 for the products of their step.
  __aicore__ inline AscendC::LocalTensor<float> Spread(int64_t slot,
                                                       const AscendC::LocalTensor<float>& from) {
    AscendC::LocalTensor<float> to = spread_.template Get<float>()[slot * kSpread];
    AscendC::Brcb(to, from, kLanes / 8, {1, 8});
    AscendC::PipeBarrier<PIPE_V>();
    return to;
  }

  __aicore__ inline void Exponentiate(const AscendC::LocalTensor<float>& scores) {
    const AscendC::LocalTensor<float> peaks = Spread(0, newPeak_);
    const AscendC::BinaryRepeatParams each(1, 1, 0, kScoreBlocks, kScoreBlocks, 1);
    for (int64_t lane = 0; lane < kBlockKeys; lane += kLanes) {
      AscendC::Sub(scores[lane], scores[lane], peaks, kLanes, rows_, each);
    }
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Exp(scores, scores, rows_ * kBlockKeys);
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void UpdateTotals(const AscendC::LocalTensor<float>& weights) {
    const AscendC::BinaryRepeatParams fold(1, 1, 1, kLaneBlocks, kScoreBlocks, kScoreBlocks);
    AscendC::Add(half_, weights, weights[kLanes], kLanes, rows_, fold);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum<float>(tileTotal_, half_, kLanes, rows_, 1, 1, kLaneBlocks);
    AscendC::Mul(total_, total_, decay_, kLanes);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Add(total_, total_, tileTotal_, kLanes);
    AscendC::PipeBarrier<PIPE_V>();
    Spread(1 + step_ % kScoreSlots, decay_);
  }

  __aicore__ inline void StoreWeights(const AscendC::LocalTensor<float>& weights) {
    AscendC::LocalTensor<T> made = narrow_.template AllocTensor<T>();
    AscendC::Cast(made, weights, AscendC::RoundMode::CAST_RINT, rows_ * kBlockKeys);
    narrow_.EnQue(made);
    AscendC::LocalTensor<T> narrow = narrow_.template DeQue<T>();
    AscendC::DataCopy(call_.weights[call_.ScoresAt(step_) + first_ * kBlockKeys], narrow,
                      rows_ * kBlockKeys);
    narrow_.FreeTensor(narrow);
  }

  // ------------------------------------------------------------------------------- output

  // Every row of `sum` by its own value: sum = sum * value, or sum / value.
  template <bool kDivide>
  __aicore__ inline void PairRows(const AscendC::LocalTensor<float>& values) {
    const int64_t size = call_.data.valueSize;
    const uint8_t pitch = size * sizeof(float) / 32;
    const AscendC::BinaryRepeatParams each(1, 1, 0, pitch, pitch, 1);
    for (int64_t lane = 0; lane < size; lane += kLanes) {
      const uint64_t lanes = Smaller(kLanes, size - lane);
      if (kDivide) {
        AscendC::Div(sum_[lane], sum_[lane], values, lanes, rows_, each);
      } else {
        AscendC::Mul(sum_[lane], sum_[lane], values, lanes, rows_, each);
      }
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // sum = sum * decay + products of `step`.
  __aicore__ inline void AddProducts(int64_t step) {
    AscendC::CrossCoreWaitFlag(kProductsReady);
    if (rows_ == 0) return;
    const int64_t count = rows_ * call_.data.valueSize;
    AscendC::LocalTensor<float> made = products_.template AllocTensor<float>();
    AscendC::DataCopy(made, call_.products[call_.ProductsAt(step) + first_ * call_.data.valueSize],
                      count);
    products_.EnQue(made);
    AscendC::LocalTensor<float> products = products_.template DeQue<float>();
    PairRows<false>(spread_.template Get<float>()[(1 + step % kScoreSlots) * kSpread]);
    AscendC::Add(sum_, sum_, products, count);
    AscendC::PipeBarrier<PIPE_V>();
    products_.FreeTensor(products);
  }

  // Every live row keeps at least itself, so no total is zero.
  __aicore__ inline void StoreOutput(const Task& task) {
    const TriangleAttentionTilingData& data = call_.data;
    PairRows<true>(Spread(0, total_));
    AscendC::LocalTensor<T> made = narrow_.template AllocTensor<T>();
    AscendC::Cast(made, sum_, AscendC::RoundMode::CAST_RINT, rows_ * data.valueSize);
    narrow_.EnQue(made);
    AscendC::LocalTensor<T> narrow = narrow_.template DeQue<T>();
    for (int64_t row = 0; row < rows_;) {
      const int64_t token = (first_ + row) / data.groupHeads;
      const int64_t end = Smaller(rows_, (token + 1) * data.groupHeads - first_);
      const int64_t head = task.group * data.groupHeads + (first_ + row) % data.groupHeads;
      AscendC::DataCopy(
          call_.output[TokenAt(task.batch, task.tile.firstToken + token) + head * data.valueSize],
          narrow[row * data.valueSize], (end - row) * data.valueSize);
      row = end;
    }
    narrow_.FreeTensor(narrow);
  }

  __aicore__ inline int64_t OutputPitch() const {
    return call_.data.kvHeads * call_.data.groupHeads * call_.data.valueSize;
  }

  __aicore__ inline int64_t TokenAt(int64_t b, int64_t token) const {
    return (b * call_.data.queryLength + token) * OutputPitch();
  }

  // Tokens that keep no key give zeros; the vector cores share them.
  __aicore__ inline void ZeroDeadTokens() {
    const int64_t cores = AscendC::GetBlockNum() * AscendC::GetSubBlockNum();
    for (int64_t b = 0; b < call_.data.batch; ++b) {
      const BatchRow row = call_.ReadRow(b);
      for (int64_t token = AscendC::GetBlockIdx(); token < call_.data.queryLength; token += cores) {
        const bool live = token >= row.first_token && token < row.end_token;
        if (!live) cache_.StoreZeros(call_.output, TokenAt(b, token), OutputPitch());
      }
    }
  }

  const Call<T>& call_;
  CacheWriter<T> cache_;
  int64_t first_ = 0;  // this core's rows of the tile
  int64_t rows_ = 0;
  int64_t step_ = 0;  // blocks since the start, as the cube core counts them
  AscendC::TQue<AscendC::TPosition::VECIN, 1> scores_, products_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> narrow_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sums_, halves_, rowState_, spread_;
  AscendC::LocalTensor<float> sum_, half_, peak_, newPeak_, decay_, total_, tilePeak_, tileTotal_;
};

}  // namespace triangle

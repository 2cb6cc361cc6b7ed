// The cube core's half of attention: scores of a tile against blocks of keys, and softmax weights
// times values. Both go to the workspace, where the vector cores find them. The scores of a block
// are made before the products of the one before it, so that cube and vector cores work at once.
// Never compiled by CANN.
#pragma once

#include "triangle_attention_call.h"

namespace triangle {

template <typename T>
class CubeCore {
 public:
  __aicore__ inline CubeCore(const Call<T>& call, AscendC::TPipe& pipe) : call_(call) {
    const int64_t rows = call.data.tileRows;
    const int64_t element = sizeof(T);
    pipe.InitBuffer(queries_, 1, rows * call.data.headSize * element);
    pipe.InitBuffer(weights_, 2, rows * kBlockKeys * element);
    pipe.InitBuffer(keys_, 2, kBlockKeys * call.data.headSize * element);
    pipe.InitBuffer(values_, 2, kBlockKeys * call.data.valueSize * element);
    pipe.InitBuffer(left_, 2, rows * kBlockDepth * element);
    pipe.InitBuffer(right_, 2, kBlockKeys * kBlockDepth * element);
    pipe.InitBuffer(sums_, 2, rows * kBlockKeys * sizeof(float));
  }

  __aicore__ inline void Process() { call_.ForEachTask(*this); }

  __aicore__ inline void Run(const Task& task) {
    LoadQueries(task);
    AscendC::LocalTensor<T> queries = queries_.template DeQue<T>();
    MakeScores(task, queries, 0);
    for (int64_t index = 0; index < task.blocks; ++index) {
      if (index + 1 < task.blocks) MakeScores(task, queries, index + 1);
      AscendC::CrossCoreWaitFlag(kWeightsReady);
      MakeProducts(task, index);
    }
    queries_.FreeTensor(queries);
  }

 private:
  // Matrices in L1 are columns of fractals, each kFractal elements wide: element (row, column) of
  // one with `rows` rows is at (column / 16 * rows + row) * 16 + column % 16.

  // A tile's rows: the heads of the group of one token, then those of the next.
  __aicore__ inline void LoadQueries(const Task& task) {
    const TriangleAttentionTilingData& data = call_.data;
    const int64_t pitch = data.kvHeads * data.groupHeads * data.headSize;
    AscendC::LocalTensor<T> queries = queries_.template AllocTensor<T>();
    AscendC::Nd2NzParams copy;
    copy.ndNum = task.tile.endToken - task.tile.firstToken;
    copy.nValue = data.groupHeads;
    copy.dValue = data.headSize;
    copy.srcNdMatrixStride = pitch;
    copy.srcDValue = data.headSize;
    copy.dstNzC0Stride = RoundUp(task.rows, kFractal);
    copy.dstNzNStride = 1;
    copy.dstNzMatrixStride = data.groupHeads * kFractal;
    const int64_t token = task.batch * data.queryLength + task.tile.firstToken;
    const int64_t head = task.group * data.groupHeads;
    AscendC::DataCopy(queries, call_.query[token * pitch + head * data.headSize], copy);
    queries_.EnQue(queries);
  }

  // `count` rows of `size` elements, `pitch` apart, as rows [first, first + count) of a matrix with
  // `rows` rows.
  __aicore__ inline void CopyRows(const AscendC::LocalTensor<T>& to,
                                  const AscendC::GlobalTensor<T>& from, int64_t count, int64_t size,
                                  int64_t pitch, int64_t rows) {
    AscendC::Nd2NzParams copy;
    copy.ndNum = 1;
    copy.nValue = count;
    copy.dValue = size;
    copy.srcNdMatrixStride = 0;
    copy.srcDValue = pitch;
    copy.dstNzC0Stride = rows;
    copy.dstNzNStride = 1;
    copy.dstNzMatrixStride = 0;
    AscendC::DataCopy(to, from, copy);
  }

  // The keys or values of a block: positions before the call's first token lie in the past, the
  // others among the new tokens.
  __aicore__ inline void LoadBlock(const Task& task, const KeyBlock& block, int64_t size,
                                   const AscendC::GlobalTensor<T>& past,
                                   const AscendC::GlobalTensor<T>& fresh,
                                   const AscendC::LocalTensor<T>& to) {
    const TriangleAttentionTilingData& data = call_.data;
    const int64_t rows = RoundUp(block.count, kFractal);
    const int64_t old = Clamp(task.row.start - block.first, 0, block.count);
    if (old > 0) {
      const int64_t slot = (task.batch * data.kvHeads + task.group) * data.pastSlots + block.first;
      CopyRows(to, past[slot * size], old, size, size, rows);
    }
    if (old < block.count) {
      const int64_t pitch = data.kvHeads * size;
      const int64_t token = task.batch * data.queryLength + block.first + old - task.row.start;
      CopyRows(to[old * kFractal], fresh[token * pitch + task.group * size], block.count - old,
               size, pitch, rows);
    }
  }

  // left_ = rows x depth, fractal after fractal along a row of fractals. `from` starts at the first
  // column wanted of a matrix in L1 with `rows` rows.
  __aicore__ inline AscendC::LocalTensor<T> LoadLeft(const AscendC::LocalTensor<T>& from,
                                                     int64_t rows, int64_t depth) {
    AscendC::LocalTensor<T> left = left_.template AllocTensor<T>();
    AscendC::LoadData2DParams load;
    load.repeatTimes = depth / kFractal;
    load.srcStride = rows / kFractal;
    for (int64_t row = 0; row < rows; row += kFractal) {
      AscendC::LoadData(left[row * depth], from[row * kFractal], load);
    }
    left_.EnQue(left);
    return left_.template DeQue<T>();
  }

  // right_ = (keys x depth) transposed: L1 holds its fractals as they are wanted.
  __aicore__ inline AscendC::LocalTensor<T> LoadKeys(const AscendC::LocalTensor<T>& from,
                                                     int64_t keys, int64_t depth) {
    AscendC::LocalTensor<T> right = right_.template AllocTensor<T>();
    AscendC::LoadData2DParams load;
    load.repeatTimes = depth / kFractal * (keys / kFractal);
    load.srcStride = 1;
    AscendC::LoadData(right, from, load);
    right_.EnQue(right);
    return right_.template DeQue<T>();
  }

  // right_ = keys x width, each fractal transposed. The transposing load is documented for half and
  // integers, so bfloat16 goes through as half: it moves bits.
  __aicore__ inline AscendC::LocalTensor<T> LoadValues(const AscendC::LocalTensor<T>& from,
                                                       int64_t keys, int64_t width) {
    AscendC::LocalTensor<T> right = right_.template AllocTensor<T>();
    AscendC::LocalTensor<half> to = right.template ReinterpretCast<half>();
    AscendC::LocalTensor<half> source = from.template ReinterpretCast<half>();
    AscendC::LoadData2DParams load;
    load.repeatTimes = width / kFractal;
    load.srcStride = keys / kFractal;
    load.ifTranspose = true;
    for (int64_t row = 0; row < keys; row += kFractal) {
      AscendC::LoadData(to[row * width], source[row * kFractal], load);
    }
    right_.EnQue(right);
    return right_.template DeQue<T>();
  }

  // sums = left x right, or added to it. Small products need a barrier before the next one reads
  // the sums.
  __aicore__ inline void Multiply(const AscendC::LocalTensor<float>& sums,
                                  AscendC::LocalTensor<T>& left, AscendC::LocalTensor<T>& right,
                                  const AscendC::MmadParams& sizes) {
    AscendC::Mmad(sums, left, right, sizes);
    if (sizes.m / kFractal * (sizes.n / kFractal) < 10) AscendC::PipeBarrier<PIPE_M>();
    left_.FreeTensor(left);
    right_.FreeTensor(right);
  }

  __aicore__ inline void StoreSums(const AscendC::GlobalTensor<float>& to,
                                   AscendC::LocalTensor<float>& made, int64_t rows, int64_t columns,
                                   int64_t pitch) {
    sums_.EnQue(made);
    AscendC::LocalTensor<float> sums = sums_.template DeQue<float>();
    AscendC::FixpipeParamsV220 store;
    store.nSize = columns;
    store.mSize = rows;
    store.srcStride = RoundUp(rows, kFractal);
    store.dstStride = pitch;
    store.ndNum = 1;
    store.srcNdStride = 0;
    store.dstNdStride = 0;
    AscendC::Fixpipe<float, float, AscendC::CFG_ROW_MAJOR>(to, sums, store);
    sums_.FreeTensor(sums);
  }

  // Mmad takes m = 1 for a vector in another layout, hence whole fractals of rows; what is computed
  // from the rows after the last is not stored.
  __aicore__ inline AscendC::MmadParams SizesOf(int64_t rows, int64_t columns, int64_t depth,
                                                bool first) {
    AscendC::MmadParams sizes;
    sizes.m = rows;
    sizes.n = columns;
    sizes.k = depth;
    sizes.cmatrixInitVal = first;
    return sizes;
  }

  __aicore__ inline void MakeScores(const Task& task, const AscendC::LocalTensor<T>& queries,
                                    int64_t index) {
    const int64_t headSize = call_.data.headSize;
    const KeyBlock block = BlockAt(task.keys, index);
    const int64_t columns = RoundUp(block.count, kFractal);
    const int64_t rows = RoundUp(task.rows, kFractal);
    AscendC::LocalTensor<T> made = keys_.template AllocTensor<T>();
    LoadBlock(task, block, headSize, call_.pastKey, call_.key, made);
    keys_.EnQue(made);
    AscendC::LocalTensor<T> keys = keys_.template DeQue<T>();
    AscendC::LocalTensor<float> sums = sums_.template AllocTensor<float>();
    for (int64_t first = 0; first < headSize; first += kBlockDepth) {
      const int64_t depth = Smaller(kBlockDepth, headSize - first);
      AscendC::LocalTensor<T> left = LoadLeft(queries[first * rows], rows, depth);
      AscendC::LocalTensor<T> right = LoadKeys(keys[first * columns], columns, depth);
      Multiply(sums, left, right, SizesOf(rows, columns, depth, first == 0));
    }
    keys_.FreeTensor(keys);
    StoreSums(call_.scores[call_.ScoresAt(scoreSteps_)], sums, task.rows, columns, kBlockKeys);
    ++scoreSteps_;
    AscendC::CrossCoreSetFlag<kGroupSync, PIPE_FIX>(kScoresReady);
  }

  // Values of a block, with zeros up to the next whole fractal: their weights are zero, but zero
  // times what lies there need not be.
  __aicore__ inline AscendC::LocalTensor<T> LoadBlockValues(const Task& task,
                                                            const KeyBlock& block) {
    const int64_t size = call_.data.valueSize;
    const int64_t rows = RoundUp(block.count, kFractal);
    AscendC::LocalTensor<T> made = values_.template AllocTensor<T>();
    LoadBlock(task, block, size, call_.pastValue, call_.value, made);
    if (rows > block.count) {
      AscendC::InitConstValueParams<uint16_t> zeros;  // zero bits are zero in both types
      zeros.repeatTimes = size / kFractal;
      zeros.blockNum = rows - block.count;
      zeros.dstGap = block.count;
      zeros.initValue = 0;
      AscendC::InitConstValue(made[block.count * kFractal].template ReinterpretCast<uint16_t>(),
                              zeros);
    }
    values_.EnQue(made);
    return values_.template DeQue<T>();
  }

  __aicore__ inline void MakeProducts(const Task& task, int64_t index) {
    const int64_t valueSize = call_.data.valueSize;
    const KeyBlock block = BlockAt(task.keys, index);
    const int64_t depth = RoundUp(block.count, kFractal);
    const int64_t rows = RoundUp(task.rows, kFractal);
    AscendC::LocalTensor<T> values = LoadBlockValues(task, block);
    AscendC::LocalTensor<T> made = weights_.template AllocTensor<T>();
    CopyRows(made, call_.weights[call_.ScoresAt(productSteps_)], task.rows, depth, kBlockKeys,
             rows);
    weights_.EnQue(made);
    AscendC::LocalTensor<T> weights = weights_.template DeQue<T>();
    for (int64_t first = 0; first < valueSize; first += kBlockDepth) {
      const int64_t width = Smaller(kBlockDepth, valueSize - first);
      AscendC::LocalTensor<float> sums = sums_.template AllocTensor<float>();
      AscendC::LocalTensor<T> left = LoadLeft(weights, rows, depth);
      AscendC::LocalTensor<T> right = LoadValues(values[first * depth], depth, width);
      Multiply(sums, left, right, SizesOf(rows, width, depth, true));
      StoreSums(call_.products[call_.ProductsAt(productSteps_) + first], sums, task.rows, width,
                valueSize);
    }
    weights_.FreeTensor(weights);
    values_.FreeTensor(values);
    ++productSteps_;
    AscendC::CrossCoreSetFlag<kGroupSync, PIPE_FIX>(kProductsReady);
  }

  const Call<T>& call_;
  int64_t scoreSteps_ = 0;
  int64_t productSteps_ = 0;
  AscendC::TQue<AscendC::TPosition::A1, 1> queries_, weights_;
  AscendC::TQue<AscendC::TPosition::B1, 1> keys_, values_;
  AscendC::TQue<AscendC::TPosition::A2, 1> left_;
  AscendC::TQue<AscendC::TPosition::B2, 1> right_;
  AscendC::TQue<AscendC::TPosition::CO1, 1> sums_;
};

}  // namespace triangle

// One call as a core sees it: its tensors, its share of the tiles, and the signals between the
// cores. Never compiled by CANN.
#pragma once

#include "kernel_operator.h"
#include "triangle_attention_plan.h"

namespace triangle {

// Signals between a cube core and its two vector cores (cross-core flags, mode 2).
constexpr uint8_t kGroupSync = 2;
constexpr uint16_t kScoresReady = 0;    // cube: a block of Q K^T is in the workspace
constexpr uint16_t kWeightsReady = 1;   // vector: its softmax weights are
constexpr uint16_t kProductsReady = 2;  // cube: weights times V is

// Addresses of the operator's inputs and outputs, in its order; absent inputs are null.
struct Addresses {
  GM_ADDR query;
  GM_ADDR key;
  GM_ADDR value;
  GM_ADDR pastKey;
  GM_ADDR pastValue;
  GM_ADDR seqlens;
  GM_ADDR promptLength;
  GM_ADDR firstValid;
  GM_ADDR output;
  GM_ADDR presentKey;
  GM_ADDR presentValue;
  GM_ADDR workspace;
};

// One tile of one group of heads.
struct Task {
  int64_t batch;
  int64_t group;
  BatchRow row;
  TokenTile tile;
  KeyRanges keys;
  int64_t blocks;
  int64_t rows;  // tokens times heads of the group
};

template <typename T>
class Call {
 public:
  __aicore__ inline Call(const Addresses& at, const TriangleAttentionTilingData& data)
      : data(data) {
    query.SetGlobalBuffer((__gm__ T*)at.query);
    key.SetGlobalBuffer((__gm__ T*)at.key);
    value.SetGlobalBuffer((__gm__ T*)at.value);
    output.SetGlobalBuffer((__gm__ T*)at.output);
    presentKey.SetGlobalBuffer((__gm__ T*)at.presentKey);
    presentValue.SetGlobalBuffer((__gm__ T*)at.presentValue);
    seqlens_.SetGlobalBuffer((__gm__ int32_t*)at.seqlens);
    if (data.pastSlots > 0) {
      pastKey.SetGlobalBuffer((__gm__ T*)at.pastKey);
      pastValue.SetGlobalBuffer((__gm__ T*)at.pastValue);
    }
    if (data.hasPromptLength) promptLength_.SetGlobalBuffer((__gm__ int32_t*)at.promptLength);
    if (data.hasFirstValid) firstValid_.SetGlobalBuffer((__gm__ int32_t*)at.firstValid);
    sharedCache = data.pastSlots > 0 && at.pastKey == at.presentKey;
    SetWorkspace(at.workspace);
  }

  __aicore__ inline BatchRow ReadRow(int64_t b) const {
    RowLengths lengths;
    lengths.end = static_cast<int64_t>(seqlens_.GetValue(b)) + 1;
    lengths.promptLength = data.hasPromptLength ? promptLength_.GetValue(b) : lengths.end;
    lengths.firstValid = data.hasFirstValid ? firstValid_.GetValue(b) : 0;
    return PlanRow(data, lengths);
  }

  // Calls worker.Run for every tile of this core: the same ones, in the same order, on the cube
  // core and on its vector cores.
  template <typename Worker>
  __aicore__ inline void ForEachTask(Worker& worker) const {
    int64_t before = 0;
    for (int64_t b = 0; b < data.batch; ++b) {
      const BatchRow row = ReadRow(b);
      const int64_t items = CountTiles(data, row) * data.kvHeads;
      for (int64_t i = FirstOwned(before, Core(), Cores()); i < items; i += Cores()) {
        worker.Run(TaskAt(b, row, i));
      }
      before += items;
    }
  }

  __aicore__ inline int64_t Core() const {
    return AscendC::GetBlockIdx() / AscendC::GetSubBlockNum();
  }
  __aicore__ inline int64_t Cores() const { return AscendC::GetBlockNum(); }

  // Rows of the workspace hold kBlockKeys scores or weights, or valueSize products.
  __aicore__ inline int64_t ScoresAt(int64_t step) const {
    return step % kScoreSlots * data.tileRows * kBlockKeys;
  }
  __aicore__ inline int64_t ProductsAt(int64_t step) const {
    return step % kScoreSlots * data.tileRows * data.valueSize;
  }

  TriangleAttentionTilingData data;
  bool sharedCache;  // past and present are the same buffers
  AscendC::GlobalTensor<T> query, key, value, pastKey, pastValue, output, presentKey, presentValue;
  AscendC::GlobalTensor<float> scores, products;
  AscendC::GlobalTensor<T> weights;

 private:
  __aicore__ inline Task TaskAt(int64_t b, const BatchRow& row, int64_t item) const {
    Task task;
    task.batch = b;
    task.group = item % data.kvHeads;
    task.row = row;
    task.tile = TileAt(data, row, item / data.kvHeads);
    task.keys = KeysOf(data, row, task.tile);
    task.blocks = CountBlocks(task.keys);
    task.rows = (task.tile.endToken - task.tile.firstToken) * data.groupHeads;
    return task;
  }

  // This core's share: score slots, product slots, weight slots.
  __aicore__ inline void SetWorkspace(GM_ADDR workspace) {
    GM_ADDR base = workspace + Core() * data.workspaceCore;
    const int64_t scoreCount = kScoreSlots * data.tileRows * kBlockKeys;
    const int64_t productCount = kScoreSlots * data.tileRows * data.valueSize;
    scores.SetGlobalBuffer((__gm__ float*)base);
    products.SetGlobalBuffer((__gm__ float*)(base + scoreCount * sizeof(float)));
    weights.SetGlobalBuffer((__gm__ T*)(base + (scoreCount + productCount) * sizeof(float)));
  }

  AscendC::GlobalTensor<int32_t> seqlens_, promptLength_, firstValid_;
};

}  // namespace triangle

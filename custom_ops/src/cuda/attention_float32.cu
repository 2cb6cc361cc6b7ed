// Attention in float32 without tensor cores: simple, for checking and for models kept in float32.
//
// A block of four warps takes one work item of 32 tile rows, a warp eight of them. For scores a
// lane is a key, for values a lane is a column (and every 32nd after it).
#include "float32_rows.cuh"
#include "launch.h"
#include "partial.cuh"

namespace trianglemix {
namespace {

constexpr int kRows = 32, kKeys = 32, kThreads = 128, kWarpRows = 8;
constexpr int kMaxColumns = 8;  // of a lane: head sizes up to 256

struct Float32Params {
  Plan plan;
  Scratch scratch;
  const float *query, *key, *value;
  float* output;
};

__device__ void load_rows(float* target, const float* base, int size, int first, int from, int to) {
  for (int i = threadIdx.x; i < kKeys * size; i += kThreads) {
    const int r = i / size, c = i % size, key = first + r;
    const bool exists = key >= from && key < to;
    target[r * pitch(size) + c] = exists ? base[static_cast<int64_t>(key) * size + c] : 0.0f;
  }
}

struct Float32Warp {
  const Float32Params& params;
  const Item& item;
  const float *queries, *keys, *values;  // in shared memory
  int lane, warp;
  float o[kWarpRows][kMaxColumns] = {};
  float peak[kWarpRows], sum[kWarpRows];

  __device__ Float32Warp(const Float32Params& params, const Item& item, const float* shared)
      : params(params), item(item), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    queries = shared;
    keys = queries + kRows * pitch(params.plan.head_size);
    values = keys + kKeys * pitch(params.plan.head_size);
    for (int r = 0; r < kWarpRows; ++r) peak[r] = kNoMax, sum[r] = 0.0f;
  }

  // Of row r with the lane's key.
  __device__ float score(int r) const {
    const Plan& plan = params.plan;
    const float* q = queries + (kWarpRows * warp + r) * pitch(plan.head_size);
    const float* k = keys + lane * pitch(plan.head_size);
    return scaled_score(plan, q, k);
  }

  // One tile: keys first + lane, of which those at or past `stop` are not shown.
  __device__ void attend(int first, int stop, bool sinks) {
    const Plan& plan = params.plan;
    const int key = first + lane;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int position = item.position + position_of_row(plan, kWarpRows * warp + r);
      const bool near = sinks || position - key < item.window || key < item.sink_end;
      const bool kept = near && key < stop && key <= position;
      const float x = kept ? score(r) : -INFINITY;
      float high = x;
      for (int k = 16; k; k /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, k));
      high = fmaxf(high, peak[r]);
      const float factor = exp2f(peak[r] - high), weight = exp2f(x - high);
      peak[r] = high;
      float total = weight;
      for (int k = 16; k; k /= 2) total += __shfl_xor_sync(0xffffffff, total, k);
      sum[r] = sum[r] * factor + total;
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) o[r][c] *= factor;
      for (int k = 0; k < kKeys; ++k) {
        const float w = __shfl_sync(0xffffffff, weight, k);
        const float* v = values + k * pitch(plan.value_head_size) + lane;
#pragma unroll
        for (int c = 0; c < kMaxColumns; ++c) {
          if (32 * c + lane < plan.value_head_size) o[r][c] += w * v[32 * c];
        }
      }
    }
  }

  __device__ void store(int* flag) {
    const Plan& plan = params.plan;
    float* output = params.output + item_offset(plan, item);
    for (int r = 0; r < kWarpRows; ++r) {
      const int row = kWarpRows * warp + r;
      if (position_of_row(plan, row) >= item.rows) continue;
      const int64_t index = static_cast<int64_t>(item.slot + item.split) * plan.tile_rows + row;
      const bool whole = item.splits == 1;
      const float scale = !whole ? 1.0f : (sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f);
      float* target = whole ? output + tile_row_offset(plan, row)
                            : params.scratch.sums + index * plan.value_head_size;
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) {
        if (32 * c + lane < plan.value_head_size) target[32 * c + lane] = o[r][c] * scale;
      }
      if (!whole && lane == 0) params.scratch.weights[index] = {peak[r], sum[r]};
    }
    if (item.splits > 1 && arrives_last(params.scratch, plan, item, 0, 1, kThreads, flag)) {
      merge_rows(params.scratch, plan, item.slot, item.splits, output, warp, item.rows * plan.pack);
    }
  }
};

__device__ void load_queries(float* target, const Float32Params& params, const Item& item) {
  const Plan& plan = params.plan;
  const int size = plan.head_size;
  for (int i = threadIdx.x; i < kRows * size; i += kThreads) {
    const int r = i / size, c = i % size, position = position_of_row(plan, r);
    const int64_t token = static_cast<int64_t>(item.b) * plan.length + item.row + position;
    const int head = item.group * plan.pack + r - position * plan.pack;
    const bool exists = position < item.rows;
    target[r * pitch(size) + c] = exists ? params.query[(token * plan.heads + head) * size + c] : 0;
  }
}

// The tiles of an item: keys `first` and on, below `stop`.
template <typename Visit>
__device__ void visit_ranges(const Item& item, Visit visit) {
  const int sink_tiles = CeilDivide(item.sinks, kKeys);
  const int count = sink_tiles + CeilDivide(Larger(0, item.high - item.low), kKeys);
  for (int t = 0; t < count; ++t) {
    const bool sinks = t < sink_tiles;
    const int first = sinks ? item.first_valid + t * kKeys : item.low + (t - sink_tiles) * kKeys;
    visit(first, Smaller(item.end, sinks ? item.first_valid + item.sinks : item.high), sinks);
  }
}
template <typename Visit>
__device__ void visit_blocks(const Scratch& scratch, const Item& item, Visit visit) {
  BlockCursor blocks(scratch.bits, scratch.words, item);
  for (int i = 0; i < item.blocks; ++i) {
    const int begin = item.first_valid + int{kBlock} * blocks.next();
    for (int first = begin; first < begin + kBlock; first += kKeys) {
      visit(first, first + kKeys, true);
    }
  }
  for (int first = item.low; first < item.high; first += kKeys) {
    visit(first, Smaller(item.end, item.high), true);
  }
}

__global__ void __launch_bounds__(kThreads)
    attention_float32(const __grid_constant__ Float32Params params) {
  extern __shared__ __align__(16) float raw[];
  __shared__ Item item;
  __shared__ int flag;
  if (threadIdx.x == 0) item = params.scratch.items[blockIdx.x];
  __syncthreads();
  if (item.rows == 0) return;
  const Plan& plan = params.plan;
  Float32Warp warp(params, item, raw);
  load_queries(raw, params, item);
  const int64_t slots =
      (static_cast<int64_t>(item.b) * plan.kv_heads + item.kv_head) * plan.capacity;
  const float* key = params.key + slots * plan.head_size;
  const float* value = params.value + slots * plan.value_head_size;
  const auto visit = [&](int first, int stop, bool sinks) {
    __syncthreads();
    load_rows(const_cast<float*>(warp.keys), key, plan.head_size, first, item.first_valid, stop);
    load_rows(const_cast<float*>(warp.values), value, plan.value_head_size, first, item.first_valid,
              stop);
    __syncthreads();
    warp.attend(first, stop, sinks);
  };
  if (params.scratch.bits == nullptr) {
    visit_ranges(item, visit);
  } else {
    visit_blocks(params.scratch, item, visit);
  }
  warp.store(&flag);
}

}  // namespace

cudaError_t launch_float32(const AttentionProblem& problem, const Plan& plan,
                           const Scratch& scratch, cudaStream_t stream) {
  const auto pointer = [](const void* p) { return static_cast<const float*>(p); };
  const Float32Params params{plan,
                             scratch,
                             pointer(problem.query),
                             pointer(problem.present_key),
                             pointer(problem.present_value),
                             static_cast<float*>(problem.output)};
  const int floats = (kRows + kKeys) * pitch(plan.head_size) + kKeys * pitch(plan.value_head_size);
  const int bytes = floats * static_cast<int>(sizeof(float));
  const cudaError_t e =
      cudaFuncSetAttribute(attention_float32, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e != cudaSuccess) return e;
  attention_float32<<<plan.items, kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace trianglemix

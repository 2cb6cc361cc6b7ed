// Appends the new tokens' keys and values to the cache, and readies the attention kernel's scratch.
//
// In place it writes the new tokens only; else it copies the past too. It also lists the work items
// of the attention kernel that follows, zeroes its counters, and zeroes the output of rows that it
// never visits (past their row's end). Cost: each byte read and written once.
#include "launch.h"
#include "partial.cuh"

namespace trianglemix {
namespace {

struct AppendTensor {
  const uint4* fresh;  // [B, S, G, pieces]
  const uint4* past;   // [B, G, P, pieces]
  uint4* present;      // [B, G, T, pieces]
  int pieces;          // 16-byte pieces of one head
  bool in_place;       // past and present are one buffer
};

struct AppendParams {
  AppendTensor tensors[2];
  Plan plan;
  Lengths lengths;
  int past_capacity;
  Scratch scratch;
  int counter_count;
  uint4* output;  // [B, S, row_pieces]
  int row_pieces;
};

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// New tokens: piece i of [S, G, pieces] goes to slot start + s of head g.
__device__ void append_new(const AppendTensor& x, const Plan& plan, const RowRange& range, int b) {
  const int row = plan.kv_heads * x.pieces;
  const int64_t count = static_cast<int64_t>(plan.length) * row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const uint4* source = x.fresh + b * count;
  for (int64_t base = blockIdx.x * kThreads + threadIdx.x; base < count; base += kUnroll * step) {
    uint4 value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * step < count) value[u] = __ldg(source + base + u * step);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * step;
      if (i >= count) break;
      const int s = static_cast<int>(i / row),
                inside = static_cast<int>(i - s * static_cast<int64_t>(row));
      const int g = inside / x.pieces, piece = inside - g * x.pieces;
      if (range.start + s >= plan.capacity) break;
      const int64_t slot =
          (static_cast<int64_t>(b) * plan.kv_heads + g) * plan.capacity + range.start + s;
      x.present[slot * x.pieces + piece] = value[u];
    }
  }
}

// All slots but those that new tokens take: the past, and zeros where there was none.
__device__ void copy_past(const AppendTensor& x, const AppendParams& params, const RowRange& range,
                          int b) {
  const Plan& plan = params.plan;
  const int64_t per_head = static_cast<int64_t>(plan.capacity) * x.pieces;
  const int64_t past_per_head = static_cast<int64_t>(params.past_capacity) * x.pieces;
  const int64_t count = per_head * plan.kv_heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += step) {
    const int g = static_cast<int>(i / per_head);
    const int64_t inside = i - g * per_head;
    const int slot = static_cast<int>(inside / x.pieces);
    if (range.writes && slot >= range.start && slot < range.start + plan.length) continue;
    const int64_t head = static_cast<int64_t>(b) * plan.kv_heads + g;
    x.present[head * per_head + inside] = slot < params.past_capacity
                                              ? __ldg(x.past + head * past_per_head + inside)
                                              : uint4{0, 0, 0, 0};
  }
}

__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ AppendParams params) {
  const int b = blockIdx.y;
  const Plan& plan = params.plan;
  const RowRange range = row_range(plan, params.lengths, b);
  const AppendTensor& x = params.tensors[blockIdx.z];
  if (!x.in_place) copy_past(x, params, range, b);
  if (range.writes) append_new(x, plan, range, b);
  if (blockIdx.z != 0) return;
  const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  if (b == 0) {
    for (int i = thread; i < params.counter_count; i += threads) params.scratch.next_item[i] = 0;
    for (int i = thread; i < plan.items; i += threads) {
      Item item;
      if (!find_item(item, plan, params.lengths, i)) item.rows = 0;
      params.scratch.items[i] = item;
    }
  }
  const int64_t row = params.row_pieces;
  uint4* output = params.output + static_cast<int64_t>(b) * plan.length * row;
  for (int64_t i = range.rows * row + thread; i < plan.length * row; i += threads) {
    output[i] = {0, 0, 0, 0};
  }
}

}  // namespace

cudaError_t launch_append(const TriangleProblem& problem, const Plan& plan, const Scratch& scratch,
                          cudaStream_t stream) {
  const int bytes = problem.dtype == DType::kFloat32 ? 4 : 2;
  AppendParams params;
  const void* fresh[2] = {problem.key, problem.value};
  const void* past[2] = {problem.past_key, problem.past_value};
  void* present[2] = {problem.present_key, problem.present_value};
  const int sizes[2] = {plan.head_size, plan.value_head_size};
  for (int i = 0; i < 2; ++i) {
    params.tensors[i] = {static_cast<const uint4*>(fresh[i]), static_cast<const uint4*>(past[i]),
                         static_cast<uint4*>(present[i]), sizes[i] * bytes / 16,
                         past[i] == present[i]};
  }
  params.plan = plan;
  params.lengths = lengths_of(problem);
  params.past_capacity = static_cast<int>(problem.past_capacity);
  params.scratch = scratch;
  params.counter_count = 1 + plan.batch * plan.groups * plan.split_tiles * kTileParts;
  params.output = static_cast<uint4*>(problem.output);
  params.row_pieces = plan.heads * plan.value_head_size * bytes / 16;
  // Enough threads for the copies and for the list of items.
  const int64_t tokens =
      plan.length + (params.tensors[0].in_place ? 0 : plan.capacity - plan.length);
  const int64_t pieces = tokens * plan.kv_heads * params.tensors[0].pieces;
  const int64_t wanted = clamp_to((pieces + 1023) / 1024, ceil_div(plan.items, kThreads), 2048);
  const int blocks = static_cast<int>(clamp_to(wanted, 1, 2048));
  append_kernel<<<dim3(blocks, plan.batch, 2), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace trianglemix

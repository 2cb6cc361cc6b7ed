// Appends the new tokens' keys and values to the cache, and readies the attention kernel's scratch.
//
// In place it writes the new tokens only; else it copies the past too; a cache that holds the new
// tokens already is left alone. Keys are turned where the node rotates; queries then go, turned, to
// the output, where attention reads them. It also lists the work items of the attention kernel that
// follows, zeroes its counters, and zeroes the output of rows that it never visits (past their
// row's end). Cost: each byte read and written once.
#include "launch.h"
#include "partial.cuh"

namespace trianglemix {
namespace {

// New tokens of one tensor and where they go, in pieces of 16 bytes: piece p of head h of token s
// of batch row b goes to target + b * target_batch + h * target_head + s * target_token + p.
struct NewTokens {
  const uint4* source;  // null: none
  int64_t source_batch, source_token;
  uint4* target;
  int64_t target_batch, target_head, target_token;
  int heads, pieces;
  bool rotates;
};

struct Past {
  const uint4* past;  // [B, G, P, pieces]
  uint4* present;     // [B, G, T, pieces]
  int pieces;
  bool in_place;  // past and present are one buffer
};

enum Part { kKeys, kValues, kQueries, kParts };  // kQueries only where they are prepared

struct AppendParams {
  NewTokens fresh[kParts];
  Past past[2];
  Rotation rotation;
  Plan plan;
  Lengths lengths;
  int past_capacity;
  Preparation preparation;
  uint4* output;  // [B, S, row_pieces]
  int row_pieces;
};

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

struct Place {
  int token, head, piece;
};
__device__ __forceinline__ Place place_of(const NewTokens& x, int64_t i) {
  const int row = x.heads * x.pieces;
  const int token = static_cast<int>(i / row);
  const int inside = static_cast<int>(i - token * static_cast<int64_t>(row));
  const int head = inside / x.pieces;
  return {token, head, inside - head * x.pieces};
}
__device__ __forceinline__ int64_t source_of(const NewTokens& x, const Place& at) {
  return at.token * x.source_token + at.head * x.pieces + at.piece;
}
__device__ __forceinline__ int64_t target_of(const NewTokens& x, const Place& at) {
  return at.head * x.target_head + at.token * x.target_token + at.piece;
}

__device__ void copy_new(const NewTokens& x, int tokens, int b) {
  const int64_t count = static_cast<int64_t>(tokens) * x.heads * x.pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const uint4* source = x.source + b * x.source_batch;
  uint4* target = x.target + b * x.target_batch;
  for (int64_t base = blockIdx.x * kThreads + threadIdx.x; base < count; base += kUnroll * step) {
    uint4 value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * step < count) {
        value[u] = __ldg(source + source_of(x, place_of(x, base + u * step)));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * step >= count) break;
      target[target_of(x, place_of(x, base + u * step))] = value[u];
    }
  }
}

// The 16 bytes of one piece as numbers.
template <typename T>
union Piece {
  static constexpr int kNumbers = 16 / sizeof(T);
  uint4 bits;
  T numbers[kNumbers];
  __device__ Piece() : bits{} {}
};

// Piece `piece` of the head at `head`, turned by the angles at `cosines` and `sines` [size / 2].
template <typename T>
__device__ __forceinline__ uint4 turned_piece(const Rotation& rotation, const T* head,
                                              const T* cosines, const T* sines, int piece) {
  constexpr int kNumbers = Piece<T>::kNumbers;
  const int first = piece * kNumbers, half = static_cast<int>(rotation.size) / 2;
  Piece<T> x, partner, cosine, sine, result;
  x.bits = __ldg(reinterpret_cast<const uint4*>(head + first));
  if (first >= 2 * half) return x.bits;
  const bool whole = !rotation.interleaved && half % kNumbers == 0;
  const bool upper = first >= half;
  if (whole) {
    const int angle = upper ? first - half : first;
    partner.bits =
        __ldg(reinterpret_cast<const uint4*>(head + (upper ? first - half : first + half)));
    cosine.bits = __ldg(reinterpret_cast<const uint4*>(cosines + angle));
    sine.bits = __ldg(reinterpret_cast<const uint4*>(sines + angle));
  }
#pragma unroll
  for (int e = 0; e < kNumbers; ++e) {
    const int d = first + e;
    if (d >= 2 * half) {
      result.numbers[e] = x.numbers[e];
      continue;
    }
    bool second = upper;
    if (!whole) {
      second = rotation.interleaved ? d & 1 : d >= half;
      const int distance = rotation.interleaved ? 1 : half;
      const int angle = rotation.interleaved ? d / 2 : (second ? d - half : d);
      partner.numbers[e] = head[second ? d - distance : d + distance];
      cosine.numbers[e] = cosines[angle];
      sine.numbers[e] = sines[angle];
    }
    const float other =
        static_cast<float>(partner.numbers[e]) * static_cast<float>(sine.numbers[e]);
    const float own = static_cast<float>(x.numbers[e]) * static_cast<float>(cosine.numbers[e]);
    result.numbers[e] = from_float<T>(second ? own + other : own - other);
  }
  return result.bits;
}

template <typename T>
__device__ void rotate_new(const NewTokens& x, const Rotation& rotation, int tokens, int start,
                           int b) {
  const int64_t count = static_cast<int64_t>(tokens) * x.heads * x.pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const uint4* source = x.source + b * x.source_batch;
  uint4* target = x.target + b * x.target_batch;
  const int64_t half = rotation.size / 2;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += step) {
    const Place at = place_of(x, i);
    const int64_t angles =
        min(static_cast<int64_t>(start) + at.token, rotation.positions - 1) * half;
    const Place head{at.token, at.head, 0};
    target[target_of(x, at)] =
        turned_piece(rotation, reinterpret_cast<const T*>(source + source_of(x, head)),
                     static_cast<const T*>(rotation.cos) + angles,
                     static_cast<const T*>(rotation.sin) + angles, at.piece);
  }
}

// All slots but those that new tokens take: the past, and zeros where there was none.
__device__ void copy_past(const Past& x, const AppendParams& params, const RowRange& range, int b) {
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

template <typename T>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ AppendParams params) {
  next_grid_begin();
  const int b = blockIdx.y;
  const Plan& plan = params.plan;
  const RowRange range = row_range(plan, params.lengths, b);
  const bool is_cache = blockIdx.z != kQueries;
  if (is_cache && !params.past[blockIdx.z].in_place) {
    copy_past(params.past[blockIdx.z], params, range, b);
  }
  NewTokens x = params.fresh[blockIdx.z];
  if (is_cache) x.target += range.start * x.target_token;
  const int fitting = is_cache ? Smaller(plan.length, plan.capacity - range.start) : range.rows;
  const int tokens = range.writes && x.source != nullptr ? fitting : 0;
  if (x.rotates) {
    rotate_new<T>(x, params.rotation, tokens, range.start, b);
  } else {
    copy_new(x, tokens, b);
  }
  if (blockIdx.z != 0) return;
  const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  if (b == 0) {
    const Preparation& next = params.preparation;
    for (int i = thread; i < next.counter_count; i += threads) next.counters[i] = 0;
    for (int i = thread; i < next.item_count; i += threads) {
      Item item;
      if (!find_item(item, plan, params.lengths, i)) item.rows = 0;
      next.items[i] = item;
    }
  }
  const int64_t row = params.row_pieces;
  uint4* output = params.output + static_cast<int64_t>(b) * plan.length * row;
  for (int64_t i = range.rows * row + thread; i < plan.length * row; i += threads) {
    output[i] = {0, 0, 0, 0};
  }
}

NewTokens cache_tokens(const AttentionProblem& problem, Part part, int bytes) {
  const bool is_key = part == kKeys;
  const int64_t pieces = (is_key ? problem.head_size : problem.value_head_size) * bytes / 16;
  const int64_t token = (is_key ? problem.key_stride : problem.value_stride) * bytes / 16;
  const int64_t head = problem.present_capacity * pieces;
  return {static_cast<const uint4*>(is_key ? problem.key : problem.value),
          problem.query_length * token,
          token,
          static_cast<uint4*>(is_key ? problem.present_key : problem.present_value),
          problem.kv_num_heads * head,
          head,
          pieces,
          static_cast<int>(problem.kv_num_heads),
          static_cast<int>(pieces),
          is_key && problem.rotation.cos != nullptr};
}

// The cache's new slots begin where the row's tokens do, which only the device knows.
NewTokens query_tokens(const AttentionProblem& problem, int bytes) {
  const int64_t pieces = problem.head_size * bytes / 16;
  const int64_t token = problem.query_stride * bytes / 16, row = problem.num_heads * pieces;
  return {static_cast<const uint4*>(problem.query),
          problem.query_length * token,
          token,
          static_cast<uint4*>(problem.output),
          problem.query_length * row,
          pieces,
          row,
          static_cast<int>(problem.num_heads),
          static_cast<int>(pieces),
          problem.rotation.cos != nullptr};
}

template <typename T>
cudaError_t launch(const AppendParams& params, dim3 grid, cudaStream_t stream) {
  append_kernel<T><<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_append(const AttentionProblem& problem, const Plan& plan,
                          const Preparation& preparation, cudaStream_t stream) {
  const int bytes = problem.dtype == DType::kFloat32 ? 4 : 2;
  const bool queries = problem.prepares_queries(), appends = problem.appends();
  AppendParams params{};
  params.fresh[kKeys] = cache_tokens(problem, kKeys, bytes);
  params.fresh[kValues] = cache_tokens(problem, kValues, bytes);
  if (queries) params.fresh[kQueries] = query_tokens(problem, bytes);
  const void* past[2] = {problem.past_key, problem.past_value};
  void* present[2] = {problem.present_key, problem.present_value};
  for (int i = 0; i < 2; ++i) {
    params.past[i] = {static_cast<const uint4*>(past[i]), static_cast<uint4*>(present[i]),
                      params.fresh[i].pieces, !appends || past[i] == present[i]};
  }
  params.rotation = problem.rotation;
  params.plan = plan;
  params.lengths = lengths_of(problem);
  params.past_capacity = static_cast<int>(problem.past_capacity);
  params.preparation = preparation;
  params.output = static_cast<uint4*>(problem.output);
  params.row_pieces = plan.heads * plan.value_head_size * bytes / 16;
  // Enough threads for the copies and for the list of items.
  const int64_t tokens = plan.length + (params.past[0].in_place ? 0 : plan.capacity - plan.length);
  int64_t pieces = !appends ? 0 : tokens * plan.kv_heads * params.fresh[kKeys].pieces;
  if (queries) pieces = max(pieces, static_cast<int64_t>(plan.length) * params.row_pieces);
  const int64_t wanted =
      Clamp((pieces + 1023) / 1024, CeilDivide(preparation.item_count, kThreads), 2048);
  const int blocks = static_cast<int>(Clamp(wanted, 1, 2048));
  const dim3 grid(blocks, plan.batch, queries ? kParts : appends ? 2 : 1);
  switch (problem.dtype) {
    case DType::kFloat32:
      return launch<float>(params, grid, stream);
    case DType::kFloat16:
      return launch<__half>(params, grid, stream);
    default:
      return launch<__nv_bfloat16>(params, grid, stream);
  }
}

}  // namespace trianglemix

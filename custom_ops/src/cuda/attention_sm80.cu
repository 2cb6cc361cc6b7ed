// Attention on any GPU from sm_80 on, for 16-bit types and every head size: mma.sync and cp.async.
//
// A block of four warps takes one work item of 64 tile rows. Q, K and V lie in shared memory with
// their 16-byte pieces swizzled against bank conflicts; the next K and V tiles are copied while the
// tensor cores work on the present ones. Head sizes are padded with zeros to kD columns, and slots
// that hold no key are filled with zeros, so that their bits are never seen.
#include "launch.h"
#include "partial.cuh"

namespace trianglemix {
namespace {

struct Sm80Params {
  Plan plan;
  Lengths lengths;
  Scratch scratch;
  const void *query, *key, *value;  // [B, S, H*D], [B, G, T, D], [B, G, T, Dv]
  void* output;
};

template <int kD>
struct Sm80Tile {
  static constexpr int kRows = 64, kThreads = 128, kStages = 2;
  static constexpr int kKeys = kD > 128 ? 32 : 64;
  static constexpr int kLine = 2 * kD;  // bytes of a row
  static constexpr int kShared = (kRows + 2 * kStages * kKeys) * kLine + 16;
};

__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

// d[16, 8] += a[16, 16] b[16, 8]
template <typename T>
__device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
#define TM_MULTIPLY(CPP, TYPE)                                                            \
  template <>                                                                             \
  __device__ __forceinline__ void multiply<CPP>(float* d, const uint32_t* a, uint32_t b0, \
                                                uint32_t b1) {                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
TM_MULTIPLY(__nv_bfloat16, "bf16")
TM_MULTIPLY(__half, "f16")

// Byte offset of 16-byte piece `piece` of row `row`.
template <int kD>
__device__ __forceinline__ uint32_t place(int row, int piece) {
  return row * Sm80Tile<kD>::kLine + ((piece ^ (row % 8)) * 16);
}

// Rows `first` ... of a [*, size] tensor; rows outside [from, to) and columns past `size` are
// zeros.
template <int kD>
__device__ __forceinline__ void load_keys(uint32_t target, const void* base, int size, int first,
                                          int from, int to) {
  constexpr int kPieces = kD / 8;
  for (int i = threadIdx.x; i < Sm80Tile<kD>::kKeys * kPieces; i += Sm80Tile<kD>::kThreads) {
    const int r = i / kPieces, piece = i % kPieces, key = first + r;
    const bool exists = key >= from && key < to && 8 * piece < size;
    const int64_t offset = exists ? static_cast<int64_t>(key) * size + 8 * piece : 0;
    copy_async(target + place<kD>(r, piece), static_cast<const char*>(base) + 2 * offset, exists);
  }
}

// The tiles of an item: those of the sinks, then those of the range, in ascending order.
struct KeyRun {
  int sink_tiles, count;
  __device__ KeyRun(const Item& item, int keys) {
    sink_tiles = ceil_div(item.sinks, keys);
    count = sink_tiles + ceil_div(max_of(0, item.high - item.low), keys);
  }
  __device__ int first(const Item& item, int keys, int t) const {
    return t < sink_tiles ? item.first_valid + t * keys : item.low + (t - sink_tiles) * keys;
  }
  // One past the last key that tile t may show.
  __device__ int stop(const Item& item, int t) const {
    return min_of(item.end, t < sink_tiles ? item.first_valid + item.sinks : item.high);
  }
};

template <typename T, int kD>
struct Sm80Block {
  using Tile = Sm80Tile<kD>;
  const Sm80Params& params;
  const Item& item;
  const KeyRun run;
  const uint32_t shared;
  const int lane, row;  // the lane's first tile row
  float o[kD / 2] = {};
  OnlineSoftmax state;

  __device__ Sm80Block(const Sm80Params& params, const Item& item, uint32_t shared)
      : params(params),
        item(item),
        run(item, Tile::kKeys),
        shared(shared),
        lane(threadIdx.x % 32),
        row(16 * (threadIdx.x / 32) + threadIdx.x % 32 / 4) {
    state.reset();
  }
  __device__ uint32_t keys(int stage) const {
    return shared + (Tile::kRows + 2 * stage * Tile::kKeys) * Tile::kLine;
  }
  __device__ uint32_t values(int stage) const { return keys(stage) + Tile::kKeys * Tile::kLine; }

  __device__ void load_queries() {
    const Plan& plan = params.plan;
    const char* base = static_cast<const char*>(params.query);
    for (int i = threadIdx.x; i < Tile::kRows * kD / 8; i += Tile::kThreads) {
      const int r = i / (kD / 8), piece = i % (kD / 8), position = position_of_row(plan, r);
      const bool exists = position < item.rows && 8 * piece < plan.head_size;
      const int64_t token = static_cast<int64_t>(item.b) * plan.length + item.row + position;
      const int head = item.group * plan.pack + r - position * plan.pack;
      const int64_t offset = (token * plan.heads + head) * plan.head_size + 8 * piece;
      copy_async(shared + place<kD>(r, piece), base + (exists ? 2 * offset : 0), exists);
    }
  }

  __device__ void load_tile(int t) {
    if (t < run.count) {
      const Plan& plan = params.plan;
      const int first = run.first(item, Tile::kKeys, t), stop = run.stop(item, t);
      const int64_t head = static_cast<int64_t>(item.b) * plan.kv_heads + item.kv_head;
      const int64_t slots = head * plan.capacity * 2;
      load_keys<kD>(keys(t % Tile::kStages),
                    static_cast<const char*>(params.key) + slots * plan.head_size, plan.head_size,
                    first, item.first_valid, stop);
      load_keys<kD>(values(t % Tile::kStages),
                    static_cast<const char*>(params.value) + slots * plan.value_head_size,
                    plan.value_head_size, first, item.first_valid, stop);
    }
    copy_commit();
  }

  __device__ __forceinline__ void score(float (&s)[Tile::kKeys / 2], uint32_t key_base) {
    const int strip = 16 * (threadIdx.x / 32);
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; ++i) s[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t a[4];
      load_matrices<false>(a, shared + place<kD>(strip + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {
        uint32_t b[4];
        const int key = 16 * j + lane % 8 + lane / 16 * 8;
        load_matrices<false>(b, key_base + place<kD>(key, 2 * step + lane / 8 % 2));
        multiply<T>(s + 8 * j, a, b[0], b[1]);
        multiply<T>(s + 8 * j + 4, a, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void mask(float (&s)[Tile::kKeys / 2], int t) {
    const Plan& plan = params.plan;
    if (plan.softcap > 0.0f) cap_scores(s, plan.scale, plan.softcap);
    if (plan.exponent < 0.0f) {  // a negative scale: the peak is the lowest score
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i) s[i] = -s[i];
    }
    const int first = run.first(item, Tile::kKeys, t), stop = run.stop(item, t);
    const bool sinks = t < run.sink_tiles;
    const int whole = max_of(item.low, item.position + item.rows - item.window);
    if (!sinks && first >= whole && first + Tile::kKeys <= min_of(stop, item.position + 1)) return;
    const int column = 2 * (lane % 4);
    ColumnMask columns;
    columns.low = -column;
    columns.sink = sinks ? kMaxTokens : item.sink_end - first - column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = item.position + position_of_row(plan, row + 8 * r);
      columns.causal[r] = min_of(position, stop - 1) - first - column;
      columns.window[r] = position - item.window - first - column;
    }
    mask_columns<0, Tile::kKeys / 2>(s, columns);
  }

  __device__ __forceinline__ void add_values(const float (&s)[Tile::kKeys / 2], uint32_t base) {
    uint32_t p[Tile::kKeys / 4];
    pack_weights<T>(p, s);
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step) {
#pragma unroll
      for (int j = 0; j < kD / 16; ++j) {
        uint32_t b[4];
        load_matrices<true>(b, base + place<kD>(16 * step + lane % 16, 2 * j + lane / 16));
        multiply<T>(o + 8 * j, p + 4 * step, b[0], b[1]);
        multiply<T>(o + 8 * j + 4, p + 4 * step, b[2], b[3]);
      }
    }
  }

  __device__ void attend() {
    const float exponent = fabsf(params.plan.exponent);
    load_queries();
    load_tile(0);
    for (int t = 0; t < run.count; ++t) {
      load_tile(t + 1);
      copy_wait<1>();
      __syncthreads();
      float s[Tile::kKeys / 2];
      score(s, keys(t % Tile::kStages));
      mask(s, t);
      const bool moved = state.find_peaks(s, exponent);
      state.weigh(s, exponent, 0);
      state.weigh(s, exponent, 1);
      if (__any_sync(0xffffffff, moved)) rescale(o, state.factor);
      add_values(s, values(t % Tile::kStages));
      __syncthreads();
    }
    copy_wait<0>();
    state.finish();
  }

  __device__ void store(int* flag) {
    const Plan& plan = params.plan;
    T* output = static_cast<T*>(params.output) + item_offset(plan, item);
    const bool used[2] = {position_of_row(plan, row) < item.rows,
                          position_of_row(plan, row + 8) < item.rows};
    if (item.splits == 1) {
      const int offset[2] = {tile_row_offset(plan, row), tile_row_offset(plan, row + 8)};
      store_rows<T>(output, o, state, offset, used, plan.value_head_size);
      return;
    }
    store_partial(params.scratch, plan, item, o, state, fabsf(plan.exponent), row, used);
    if (arrives_last(params.scratch, plan, item, 0, 1, Tile::kThreads, flag)) {
      merge_rows(params.scratch, plan, item.slot, item.splits, output, threadIdx.x / 32,
                 item.rows * plan.pack);
    }
  }
};

template <typename T, int kD>
__global__ void __launch_bounds__(Sm80Tile<kD>::kThreads)
    attention_sm80(const __grid_constant__ Sm80Params params) {
  extern __shared__ __align__(128) char raw[];
  __shared__ Item item;
  if (threadIdx.x == 0) item = params.scratch.items[blockIdx.x];
  __syncthreads();
  if (item.rows == 0) return;
  Sm80Block<T, kD> block(params, item, shared_address(raw));
  block.attend();
  block.store(reinterpret_cast<int*>(raw + Sm80Tile<kD>::kShared - 16));
}

template <typename T, int kD>
cudaError_t launch(const Sm80Params& params, cudaStream_t stream) {
  const auto kernel = attention_sm80<T, kD>;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             Sm80Tile<kD>::kShared);
  if (e != cudaSuccess) return e;
  kernel<<<params.plan.items, Sm80Tile<kD>::kThreads, Sm80Tile<kD>::kShared, stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_type(const Sm80Params& params, cudaStream_t stream) {
  const int size = max_of(params.plan.head_size, params.plan.value_head_size);
  if (size <= 64) return launch<T, 64>(params, stream);
  if (size <= 128) return launch<T, 128>(params, stream);
  return launch<T, 256>(params, stream);
}

}  // namespace

cudaError_t launch_sm80(const TriangleProblem& problem, const Plan& plan, const Scratch& scratch,
                        cudaStream_t stream) {
  const Sm80Params params{plan,          lengths_of(problem), scratch,
                          problem.query, problem.present_key, problem.present_value,
                          problem.output};
  return problem.dtype == DType::kFloat16 ? launch_type<__half>(params, stream)
                                          : launch_type<__nv_bfloat16>(params, stream);
}

}  // namespace trianglemix

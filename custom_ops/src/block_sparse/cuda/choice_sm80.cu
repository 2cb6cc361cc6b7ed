// The choice of blocks on any GPU from sm_80 on, for 16-bit types and every head size.
//
// A block of four warps takes items of 128 sampled rows (64 of heads above 128): a warp has one or
// two strips of 16 rows, two units each, which every tile of 64 keys serves. The next tile's keys
// are copied while one's scores are computed.
#include "../../cuda/sm80_tile.cuh"
#include "choose.cuh"

namespace trianglemix {
namespace {

template <int kHeadSize>
struct Tile {
  static constexpr int kD = kHeadSize, kThreads = 128, kKeys = 64;
  static constexpr int kRows = choice_rows_sm80(kD), kStrips = kRows / 64;
  static constexpr int kUnits = kRows / int{kSamples}, kLine = 2 * kD, kPieces = kD / 8;
  static constexpr int kShared = (kRows + 2 * kKeys) * kLine;
};

template <typename T, typename Tile>
struct Chooser {
  const ChoiceParams& params;
  const uint32_t shared;
  const int warp, lane;

  __device__ const ChoicePlan& plan() const { return params.plan; }
  __device__ uint32_t keys(int t) const {
    return shared + (Tile::kRows + t % 2 * Tile::kKeys) * Tile::kLine;
  }
  // The warp's first unit of a strip.
  __device__ int unit_of(int strip) const { return 2 * (Tile::kStrips * warp + strip); }

  // Sampled rows, zeros where there is none, and past the head's end.
  __device__ void load_queries(const ChoiceItem& item) const {
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kPieces; i += Tile::kThreads) {
      const int r = i / Tile::kPieces, piece = i % Tile::kPieces, unit = r / int{kSamples};
      const int tile = item.tile(plan(), Smaller(unit, item.count - 1));
      const int slot =
          item.first_valid + int{kBlock} * tile + int{kSampleStep} * (r % int{kSamples} + 1) - 1;
      const bool exists =
          unit < item.count && slot < item.sampled_end && 8 * piece < plan().head_size;
      const int64_t token = static_cast<int64_t>(item.b) * plan().length + slot - item.start;
      const int64_t line = token * plan().heads + item.head(plan(), unit);
      const char* query = static_cast<const char*>(params.query);
      copy_async(shared + place<Tile::kD>(r, piece),
                 query + (exists ? 2 * (line * plan().head_size + 8 * piece) : 0), exists ? 16 : 0);
    }
  }
  // Keys from slot `first` on; zeros past the buffer's end.
  __device__ void load_keys(const ChoiceItem& item, uint32_t target, int first) const {
    const int64_t head = static_cast<int64_t>(item.b) * plan().kv_heads + item.kv_head;
    const char* base = static_cast<const char*>(params.key) +
                       2 * (head * plan().capacity + first) * plan().head_size;
    for (int i = threadIdx.x; i < Tile::kKeys * Tile::kPieces; i += Tile::kThreads) {
      const int r = i / Tile::kPieces, piece = i % Tile::kPieces;
      const bool exists = first + r < plan().capacity && 8 * piece < plan().head_size;
      copy_async(target + place<Tile::kD>(r, piece),
                 base + (exists ? 2 * (r * plan().head_size + 8 * piece) : 0), exists ? 16 : 0);
    }
    copy_commit();
  }

  using Scores = float[Tile::kStrips][Tile::kKeys / 2];
  __device__ __forceinline__ void score(Scores& s, uint32_t keys) const {
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) {
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i) s[strip][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < Tile::kD / 16; ++step) {
      uint32_t a[Tile::kStrips][4];
#pragma unroll
      for (int strip = 0; strip < Tile::kStrips; ++strip) {
        const int r = int{kSamples} * unit_of(strip) + lane % 16;
        load_matrices<false>(a[strip], shared + place<Tile::kD>(r, 2 * step + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {
        uint32_t b[4];
        const int key = 16 * j + lane % 8 + lane / 16 * 8;
        load_matrices<false>(b, keys + place<Tile::kD>(key, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int strip = 0; strip < Tile::kStrips; ++strip) {
          multiply<T>(s[strip] + 8 * j, a[strip], b[0], b[1]);
          multiply<T>(s[strip] + 8 * j + 4, a[strip], b[2], b[3]);
        }
      }
    }
  }

  // `first` is the first key of the tile, counted from the first of tile 0.
  __device__ __forceinline__ void add(UnitSums<1>& sums, float (&s)[Tile::kKeys / 2],
                                      int first) const {
    const int block = first / int{kBlock};
    if (plan().softcap == 0.0f && block < sums.tile[0]) {
      return sums.template add<false>(s, plan().exponent, first);
    }
    if (plan().softcap > 0.0f) cap_scores(s, plan().scale, plan().softcap);
    sums.template add<true>(s, plan().exponent, first);
  }

  __device__ void pass(const ChoiceItem& item) const {
    UnitSums<1> sums[Tile::kStrips];
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) {
      const int unit = unit_of(strip);
      sums[strip].open(plan(), item, unit, sums_of_unit(params, Tile::kUnits, unit));
    }
    load_queries(item);
    // Tiles of keys, the last first: two to a block.
    const int count = (item.last_tile(plan()) + 1) * (int{kBlock} / Tile::kKeys);
    load_keys(item, keys(count - 1), item.first_valid + (count - 1) * Tile::kKeys);
#pragma unroll 1
    for (int t = count - 1; t >= 0; --t) {
      if (t > 0) load_keys(item, keys(t - 1), item.first_valid + (t - 1) * Tile::kKeys);
      if (t == 0) copy_commit();
      copy_wait<1>();
      __syncthreads();
      Scores s;
      score(s, keys(t));
#pragma unroll
      for (int strip = 0; strip < Tile::kStrips; ++strip) {
        add(sums[strip], s[strip], t * Tile::kKeys);
        if (t % 2 == 0) sums[strip].close(t / 2);
      }
      __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) {
      sums[strip].choose(params, item, unit_of(strip));
    }
  }
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    choice_sm80(const __grid_constant__ ChoiceParams params) {
  extern __shared__ __align__(128) char raw[];
  const ChoicePlan& plan = params.plan;
  fill_rest(params, blockIdx.x * Tile::kThreads + threadIdx.x, gridDim.x * Tile::kThreads, 2);
  const Chooser<T, Tile> chooser{params, shared_address(raw), static_cast<int>(threadIdx.x / 32),
                                 static_cast<int>(threadIdx.x % 32)};
  for (int round = 0; round * plan.blocks < plan.items; ++round) {
    const int number = choice_number(plan, blockIdx.x, round);
    if (number >= plan.items) continue;
    const ChoiceItem item = choice_item(plan, params.lengths, number);
    if (item.count > 0) chooser.pass(item);
  }
}

template <typename T, int kD>
cudaError_t launch(const ChoiceParams& params, cudaStream_t stream) {
  const auto kernel = choice_sm80<T, Tile<kD>>;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile<kD>::kShared);
  if (e != cudaSuccess) return e;
  kernel<<<params.plan.blocks, Tile<kD>::kThreads, Tile<kD>::kShared, stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_type(const ChoiceParams& params, cudaStream_t stream) {
  if (params.plan.head_size > 128) return launch<T, 256>(params, stream);
  if (params.plan.head_size > 64) return launch<T, 128>(params, stream);
  return launch<T, 64>(params, stream);
}

}  // namespace

cudaError_t launch_choice_sm80(const BlockSparseProblem& problem, const ChoiceParams& params,
                               cudaStream_t stream) {
  return problem.dtype == DType::kFloat16 ? launch_type<__half>(params, stream)
                                          : launch_type<__nv_bfloat16>(params, stream);
}

}  // namespace trianglemix

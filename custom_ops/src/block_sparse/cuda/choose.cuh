// What the choice is made of on every GPU: block sums of a unit's sampled rows, the threshold,
// bits.
#pragma once

#include "../../cuda/masks.cuh"
#include "../../cuda/softmax.cuh"
#include "choice.h"

namespace trianglemix {

// A sum above 2^this, of exponentials relative to a row's reference score, moves the reference.
constexpr float kMostSum = 1.152921504606847e18f;  // 2^60

// What a sum of each sampled row counts for: one over the row's whole, 0 where there is no such
// row.
struct Shares {
  float of[kSamples];
};

// Eight numbers of one block, a row each.
template <typename E>
struct BlockSums;
template <>
struct BlockSums<float> {
  float4 x[2];
  __device__ __forceinline__ float dot(const Shares& share) const {
    const float rows[kSamples] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kSamples; ++r) sum += rows[r] * share.of[r];
    return sum;
  }
};
template <>
struct BlockSums<__nv_bfloat16> {
  uint4 x;
  __device__ __forceinline__ float dot(const Shares& share) const {
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kSamples; ++r) {
      const uint32_t bits = r % 2 ? pairs[r / 2] & 0xffff0000u : pairs[r / 2] << 16;
      sum += __uint_as_float(bits) * share.of[r];
    }
    return sum;
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int k = 16; k; k /= 2) x += __shfl_xor_sync(0xffffffff, x, k);
  return x;
}

// The mass of every block of a tile, by the lanes of a warp, in chunks of 32 blocks: they are
// written over the sums they are made of.
template <typename E>
struct Masses {
  char* chunks;  // of 32 blocks: 32 * 8 sums; then the first 32 numbers are the masses
  int count;     // blocks

  __device__ __forceinline__ float* at(int first) const {
    return reinterpret_cast<float*>(chunks + first * int{kSamples} * static_cast<int>(sizeof(E))) +
           threadIdx.x % 32;
  }
  // Returns the sum of all, and the largest.
  __device__ float2 fill(const Shares& share) const {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f, most = 0.0f;
    for (int first = 0; first < count; first += 32) {
      const auto* sums = reinterpret_cast<const BlockSums<E>*>(
          chunks + first * int{kSamples} * static_cast<int>(sizeof(E)));
      const float mass = first + lane < count ? sums[lane].dot(share) : 0.0f;
      sum += mass, most = fmaxf(most, mass);
      __syncwarp();
      *at(first) = mass;
    }
#pragma unroll
    for (int k = 16; k; k /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, k));
    return {warp_sum(sum), most};
  }
  __device__ float at_least(int bits) const {
    float sum = 0.0f;
    for (int first = 0; first < count; first += 32) {
      const float mass = *at(first);
      sum += __float_as_int(mass) >= bits ? mass : 0.0f;
    }
    return warp_sum(sum);
  }
  // The largest number so that the masses that reach it sum to `goal`, by halves of the numbers
  // between: those that are not negative are in the order of their bits.
  __device__ float threshold(float goal, float most) const {
    int low = 0, high = __float_as_int(most) + 1;  // enough; not enough
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (at_least(middle) >= goal ? low : high) = middle;
    }
    return __int_as_float(low);
  }
};

// Chooses the blocks of a tile of one head: its bits, and attention's items. By one warp.
template <typename E>
__device__ __noinline__ void choose_blocks(const ChoiceParams& params, const ChoiceItem& work,
                                           int unit, E* sums, Shares share) {
  const ChoicePlan& plan = params.plan;
  const int lane = threadIdx.x % 32;
  const int tile = work.tile(plan, unit), head = work.head(plan, unit);
  const Masses<E> masses{reinterpret_cast<char*>(sums), tile + 1};
  const float2 all = masses.fill(share);
  const float theta = masses.threshold(plan.rule.mass * all.x, all.y);
  const int number = tile_number(plan, work.b, head, tile - work.begin);
  uint32_t* bits = params.scratch.bits + static_cast<int64_t>(number) * plan.words;
  int kept = 0;
  for (int word = 0; 32 * word <= tile; ++word) {
    const int block = 32 * word + lane;
    const bool keep = block <= tile &&
                      (*masses.at(32 * word) >= theta || IsForced(plan.rule.pattern, tile, block));
    const uint32_t ballot = __ballot_sync(0xffffffff, keep);
    if (lane == 0) bits[word] = ballot;
    kept += __popc(ballot);
  }
  const int items = plan.tile_items * plan.splits;
  const TiledRow row = tiled_row(plan, params.lengths, work.b);
  for (int item = number * items + lane; item < (number + 1) * items; item += 32) {
    params.items[item] = block_item(plan, row, work.b, head, tile, kept, item);
  }
  __syncwarp();  // the sums' place is free
}

// What no warp chooses for, by `threads` threads of which this is number `thread`: the bits and
// items of dense tiles, items that there are not, and rows that keep no key.
__device__ inline void fill_rest(const ChoiceParams& params, int thread, int threads, int bytes) {
  const ChoicePlan& plan = params.plan;
  for (int i = thread; i < plan.row_tiles * plan.batch * plan.heads; i += threads) {
    const int head = i % plan.heads, b = i / plan.heads % plan.batch;
    const int nth = i / plan.heads / plan.batch, number = tile_number(plan, b, head, nth);
    const TiledRow row = tiled_row(plan, params.lengths, b);
    const int tile = static_cast<int>(row.begin) + nth;
    if (row.is_sparse(tile)) continue;
    const bool exists = tile < row.end_tile;
    uint32_t* bits = params.scratch.bits + static_cast<int64_t>(number) * plan.words;
    for (int word = 0; exists && 32 * word <= tile; ++word) {
      bits[word] = 0xffffffffu >> (31 - Smaller(31, tile - 32 * word));
    }
    const int items = plan.tile_items * plan.splits;
    for (int item = number * items; item < (number + 1) * items; ++item) {
      params.items[item] = block_item(plan, row, b, head, tile, exists ? tile + 1 : 0, item);
    }
  }
  const int64_t line = static_cast<int64_t>(plan.heads) * plan.value_head_size * bytes / 16;
  for (int b = 0; b < plan.batch; ++b) {
    uint4* output = static_cast<uint4*>(params.output) + b * plan.length * line;
    const int64_t pads = tiled_row(plan, params.lengths, b).first_token * line;
    for (int64_t i = thread; i < pads; i += threads) output[i] = {0, 0, 0, 0};
  }
}

// Where the sums of a unit of the thread block's item lie.
__device__ inline __nv_bfloat16* sums_of_unit(const ChoiceParams& params, int units, int unit) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * units + unit;
  return reinterpret_cast<__nv_bfloat16*>(params.scratch.sums) +
         number * (32 * int{kSamples}) * params.plan.words;
}

// Sums over blocks of the sampled rows of two units, on score fragments (layout: softmax.cuh): row
// r of a lane's two is row lane / 4 of unit r. Blocks come in descending order.
//
// Exponentials are relative to a reference, a score of the row, and not to a running maximum: no
// sum is ever rescaled, and none needs a maximum, unless one is far above the reference. Then the
// reference moves, and what was summed before is rescaled where it lies. So it is for the first
// tile, too.
//
// kSplit warps may share a unit: each sums the blocks b % kSplit == turn.
template <int kSplit>
struct UnitSums {
  __nv_bfloat16* sums[2];  // [32 * words, 8] of each unit
  int tile[2];             // of each unit
  int last[2];             // key of the lane's row itself, counted from that of tile 0; -1: no row
  float reference[2], whole[2], part[2];
  int turn;
  uint32_t kept;  // sums of both units of one of the last blocks, as bfloat16

  // Begins with units `unit` and the next of an item, whose sums lie at `place`.
  __device__ __forceinline__ void open(const ChoicePlan& plan, const ChoiceItem& item, int unit,
                                       __nv_bfloat16* place, int own_turn = 0) {
    turn = own_turn;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tile[r] = item.tile(plan, Smaller(unit + r, item.count - 1));
      last[r] = int{kBlock} * tile[r] + int{kSampleStep} * (int(threadIdx.x) % 32 / 4 + 1) - 1;
      if (item.first_valid + last[r] >= item.sampled_end) last[r] = -1;
      sums[r] = place + r * (32 * int{kSamples}) * plan.words;
      reference[r] = kNoMax;
      whole[r] = part[r] = 0.0f;
    }
    kept = 0;
  }

  // The lane's share of a row's sum.
  template <bool kMasked, int kCount>
  __device__ __forceinline__ float sum_row(const float (&s)[kCount], int r, float exponent,
                                           int causal) const {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = exp2_approx(fmaf(s[i + 2 * r + e], exponent, -reference[r]));
        if (!kMasked || 2 * i + e <= causal) sum[e] += x;
      }
    }
    return sum[0] + sum[1];
  }

  // Where the sum of one of a row's four lanes is too high, the largest of their scores becomes the
  // reference. `block` is the one at hand.
  template <bool kMasked, int kCount>
  __device__ __forceinline__ void move_reference(const float (&s)[kCount], int r, float exponent,
                                                 int causal, int block, bool high) {
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!kMasked || 2 * i + e <= causal) best = fmaxf(best, s[i + 2 * r + e] * exponent);
      }
    }
    const int lane = threadIdx.x % 32;
    const uint32_t quad = __ballot_sync(0xffffffff, high) >> lane / 4 * 4 & 15;
    best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 1));
    best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 2));
    const bool moves = quad != 0 && best > reference[r];
    const bool first = reference[r] == kNoMax;
    const float factor = moves ? exp2_approx(reference[r] - best) : 1.0f;
    reference[r] = moves ? best : reference[r];
    whole[r] *= factor, part[r] *= factor;
    const float own = __uint_as_float(r ? kept & 0xffff0000u : kept << 16) * factor;
    kept = r ? (kept & 0xffffu) | (pack2<__nv_bfloat16>(0.0f, own) & 0xffff0000u)
             : (kept & 0xffff0000u) | (pack2<__nv_bfloat16>(own, 0.0f) & 0xffffu);
    if (__any_sync(0xffffffff, moves && !first && lane % kSplit == turn)) {
      const int from = (block / 4 + 1) * 4;  // what is written already
      for (int b = from + lane % 4; b <= tile[r] && lane % kSplit == turn; b += 4) {
        __nv_bfloat16& sum = sums[r][b * int{kSamples} + lane / 4];
        sum = __float2bfloat16_rn(__bfloat162float(sum) * factor);
      }
    }
  }

  // Adds a tile of keys, the first of which is `first` counted from that of tile 0. Its mask is
  // that of the rows' own block, or none.
  template <bool kMasked, int kCount>
  __device__ __forceinline__ void add(const float (&s)[kCount], float exponent, int first) {
    const int column = first + 2 * (threadIdx.x % 4);
    const int causal[2] = {last[0] - column, last[1] - column};
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = sum_row<kMasked>(s, r, exponent, causal[r]);
    const bool high[2] = {!(sum[0] <= kMostSum), !(sum[1] <= kMostSum)};
    if (__any_sync(0xffffffff, high[0] || high[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        move_reference<kMasked>(s, r, exponent, causal[r], first / int{kBlock}, high[r]);
        sum[r] = sum_row<kMasked>(s, r, exponent, causal[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) part[r] += sum[r];
  }

  // Ends a block; four are written together.
  __device__ __forceinline__ void close(int block) {
    const int quad = threadIdx.x % 4;
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = part[r] + __shfl_xor_sync(0xffffffff, part[r], 1);
      part[r] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
    const uint32_t both = pack2<__nv_bfloat16>(sum[0], sum[1]);
    kept = block % 4 == quad ? both : kept;
    whole[0] += __uint_as_float(both << 16);
    whole[1] += __uint_as_float(both & 0xffff0000u);
    if (block % 4 >= kSplit) return;
    const int place = (block / 4 * 4 + quad) * int{kSamples} + threadIdx.x % 32 / 4;
    if (quad % kSplit == turn) {
      sums[0][place] = __ushort_as_bfloat16(static_cast<uint16_t>(kept));
      sums[1][place] = __ushort_as_bfloat16(static_cast<uint16_t>(kept >> 16));
    }
    kept = 0;
  }

  // Of unit r, in all lanes.
  __device__ __forceinline__ Shares shares(int r) const {
    const float own = last[r] >= 0 && whole[r] > 0.0f ? 1.0f / whole[r] : 0.0f;
    Shares share;
#pragma unroll
    for (int k = 0; k < kSamples; ++k) share.of[k] = __shfl_sync(0xffffffff, own, 4 * k);
    return share;
  }

  // Chooses for both units, `unit` and the next of the item.
  __device__ __forceinline__ void choose(const ChoiceParams& params, const ChoiceItem& item,
                                         int unit) const {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (unit + r < item.count) choose_blocks(params, item, unit + r, sums[r], shares(r));
    }
  }
};

}  // namespace trianglemix

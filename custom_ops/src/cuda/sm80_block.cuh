// What a block of the kernel for any GPU does: one work item, from its queries to its results.
#pragma once

#include "sm80_tile.cuh"

namespace trianglemix {

template <typename T, typename Tile, typename Run>
struct Sm80Block {
  static constexpr int kD = Tile::kD;
  using Scores = float[Tile::kStrips][Tile::kKeys / 2];
  const Sm80Params& params;
  const Item& item;
  Run run;
  const uint32_t shared;
  const int lane, warp;
  float o[Tile::kStrips][kD / 2] = {};
  OnlineSoftmax state[Tile::kStrips];

  __device__ Sm80Block(const Sm80Params& params, const Item& item, uint32_t shared)
      : params(params),
        item(item),
        run(params.scratch, item),
        shared(shared),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) state[strip].reset();
  }
  __device__ uint32_t keys(int t) const {
    return shared + (Tile::kRows + 2 * (t % Tile::kStages) * Tile::kKeys) * Tile::kLine;
  }
  __device__ uint32_t values(int t) const { return keys(t) + Tile::kKeys * Tile::kLine; }
  // First tile row of the warp's strip, and of the lane in it.
  __device__ int strip_row(int strip) const { return 16 * (Tile::kStrips * warp + strip); }
  __device__ int lane_row(int strip) const { return strip_row(strip) + lane / 4; }

  __device__ void load_queries() {
    const Plan& plan = params.plan;
    const char* base = static_cast<const char*>(params.query);
    for (int i = threadIdx.x; i < Tile::kRows * kD / 8; i += Tile::kThreads) {
      const int r = i / (kD / 8), piece = i % (kD / 8), position = position_of_row(plan, r);
      const bool exists = position < item.rows && 8 * piece < plan.head_size;
      const int64_t token = static_cast<int64_t>(item.b) * plan.length + item.row + position;
      const int head = item.group * plan.pack + r - position * plan.pack;
      const int64_t offset = (token * plan.heads + head) * plan.head_size + 8 * piece;
      copy_async(shared + place<kD>(r, piece), base + (exists ? 2 * offset : 0), exists ? 16 : 0);
    }
  }

  // Where the cache of a tensor has what a thread copies: its 16-byte piece of every kStep-th key.
  struct Source {
    const char* first;  // of key 0 of a tile that begins at slot 0
    const int& size;    // of a head

    __device__ __forceinline__ int line() const { return 2 * size; }  // bytes of a key
    __device__ __forceinline__ int bytes() const { return 8 * copied_piece() < size ? 16 : 0; }
    // The tile that begins at slot `key`: the one place that knows how keys lie in memory.
    // (check_sizes sees to it that 32 bits are enough; a product of 64 costs registers.)
    __device__ __forceinline__ const char* at(int key) const {
      return first + static_cast<uint32_t>(key * line());
    }
  };
  __device__ Source source_of(const void* cache, const int& size) const {
    const Plan& plan = params.plan;
    const int64_t head = static_cast<int64_t>(item.b) * plan.kv_heads + item.kv_head;
    const int64_t key = head * plan.capacity + copied_row();
    return {static_cast<const char*>(cache) + 2 * (key * size + 8 * copied_piece()), size};
  }
  __device__ static int copied_row() { return threadIdx.x / Tile::kPieces; }
  __device__ static int copied_piece() { return threadIdx.x % Tile::kPieces; }

  // Keys or values of tile t, to which the run has come.
  __device__ __forceinline__ void copy_tile(uint32_t target, const Source& source, int t) const {
    const int first = run.start(t);
    if (run.is_whole(t, first)) {
      const char* tile = source.at(first);
#pragma unroll
      for (int i = 0; i < Tile::kKeys / Tile::kStep; ++i) {
        copy_async(target + place<kD>(copied_row() + i * Tile::kStep, copied_piece()),
                   tile + i * Tile::kStep * source.line(), source.bytes());
      }
      return;
    }
    const int split = run.split(t);
#pragma unroll 1
    for (int i = 0; i < Tile::kKeys / Tile::kStep; ++i) {
      const int r = copied_row() + i * Tile::kStep;
      const int key = r + (r < split ? item.first_valid : first);
      const bool exists = key >= item.first_valid && key < item.end;
      copy_async(target + place<kD>(r, copied_piece()),
                 source.at(exists ? key : copied_row()) - copied_row() * source.line(),
                 exists ? source.bytes() : 0);
    }
  }

  __device__ __forceinline__ void score(Scores& s, uint32_t keys) {
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) {
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i) s[strip][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t a[Tile::kStrips][4];
#pragma unroll
      for (int strip = 0; strip < Tile::kStrips; ++strip) {
        const int r = strip_row(strip) + lane % 16;
        load_matrices<false>(a[strip], shared + place<kD>(r, 2 * step + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 16; ++j) {
        uint32_t b[4];
        const int key = 16 * j + lane % 8 + lane / 16 * 8;
        load_matrices<false>(b, keys + place<kD>(key, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int strip = 0; strip < Tile::kStrips; ++strip) {
          multiply<T>(s[strip] + 8 * j, a[strip], b[0], b[1]);
          multiply<T>(s[strip] + 8 * j + 4, a[strip], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void prepare(float (&s)[Tile::kKeys / 2]) {
    const Plan& plan = params.plan;
    if (plan.softcap > 0.0f) cap_scores(s, plan.scale, plan.softcap);
    if (plan.exponent < 0.0f) {  // a negative scale: the peak is the lowest score
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i) s[i] = -s[i];
    }
  }
  __device__ __forceinline__ void mask(float (&s)[Tile::kKeys / 2], int strip, int t) {
    const int row = lane_row(strip);
    run.mask(s, t, 2 * (lane % 4),
             {position_of_row(params.plan, row), position_of_row(params.plan, row + 8)});
  }

  __device__ __forceinline__ void add_values(const Scores& s, uint32_t values) {
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step) {
      uint32_t p[Tile::kStrips][4];
#pragma unroll
      for (int strip = 0; strip < Tile::kStrips; ++strip) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[strip][i] = pack2<T>(s[strip][8 * step + 2 * i], s[strip][8 * step + 2 * i + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < kD / 16; ++j) {
        uint32_t b[4];
        load_matrices<true>(b, values + place<kD>(16 * step + lane % 16, 2 * j + lane / 16));
#pragma unroll
        for (int strip = 0; strip < Tile::kStrips; ++strip) {
          multiply<T>(o[strip] + 8 * j, p[strip], b[0], b[1]);
          multiply<T>(o[strip] + 8 * j + 4, p[strip], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void weigh(Scores& s, int t) {
    const float exponent = fabsf(params.plan.exponent);
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) {
      prepare(s[strip]);
      mask(s[strip], strip, t);
      const bool moved = state[strip].find_peaks(s[strip], exponent);
      state[strip].weigh(s[strip], exponent, 0);
      state[strip].weigh(s[strip], exponent, 1);
      if (__any_sync(0xffffffff, moved)) rescale(o[strip], state[strip].factor);
    }
  }

  __device__ void attend() {
    const bool active = strip_row(0) < item.rows * params.plan.pack;
    const Source key = source_of(params.key, params.plan.head_size);
    const Source value = source_of(params.value, params.plan.value_head_size);
    constexpr bool kAhead = Tile::kStages > 1;
    load_queries();
    run.advance(0);
    copy_tile(keys(0), key, 0);
    if (kAhead) copy_tile(values(0), value, 0);
    copy_commit();
    for (int t = 0; t < run.count; ++t) {
      const bool more = t + 1 < run.count;
      if (kAhead) {
        if (more) run.advance(t + 1);
        if (more) copy_tile(keys(t + 1), key, t + 1);
        if (more) copy_tile(values(t + 1), value, t + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
      } else {
        copy_wait<0>();
        __syncthreads();  // the keys are there, the values before are done with
        copy_tile(values(t), value, t);
        copy_commit();
      }
      Scores s;
      if (active) score(s, keys(t));
      if (!kAhead) {
        copy_wait<0>();
        __syncthreads();  // the values are there, the keys are done with
        if (more) run.advance(t + 1);
        if (more) copy_tile(keys(t + 1), key, t + 1);
        copy_commit();
      }
      if (active) weigh(s, t);
      if (active) add_values(s, values(t));
      if (kAhead) __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) state[strip].finish();
  }

  __device__ void store(int* flag) {
    const Plan& plan = params.plan;
    T* output = static_cast<T*>(params.output) + item_offset(plan, item);
#pragma unroll
    for (int strip = 0; strip < Tile::kStrips; ++strip) {
      const int row = lane_row(strip);
      const bool used[2] = {position_of_row(plan, row) < item.rows,
                            position_of_row(plan, row + 8) < item.rows};
      if (item.splits == 1) {
        const int offset[2] = {tile_row_offset(plan, row), tile_row_offset(plan, row + 8)};
        store_rows<T>(output, o[strip], state[strip], offset, used, plan.value_head_size);
      } else {
        store_partial(params.scratch, plan, item, o[strip], state[strip], fabsf(plan.exponent), row,
                      used);
      }
    }
    if (item.splits > 1 && arrives_last(params.scratch, plan, item, 0, 1, Tile::kThreads, flag)) {
      merge_rows(params.scratch, plan, item.slot, item.splits, output, warp, item.rows * plan.pack);
    }
  }
};

}  // namespace trianglemix

// Masks of the tiles at the boundaries of a pattern, on score fragments (layout: softmax.cuh).
#pragma once

#include <cmath>

#include "geometry.h"

namespace trianglemix {

// Columns kept by a lane's two rows, relative to the tile and to the lane's first column:
// c >= low and c <= causal[r] and (c > window[r] or c < sink).
struct ColumnMask {
  int low, sink;
  int causal[2], window[2];
};

template <int kFrom, int kTo, int kCount>
__device__ __forceinline__ void mask_causal(float (&s)[kCount], const int (&causal)[2]) {
#pragma unroll
  for (int i = kFrom; i < kTo; ++i) {
    const int column = 8 * (i / 4 - kFrom / 4) + i % 2;
    if (column > causal[(i / 2) % 2]) s[i] = -INFINITY;
  }
}

template <int kFrom, int kTo, int kCount>
__device__ __forceinline__ void mask_columns(float (&s)[kCount], const ColumnMask& mask) {
#pragma unroll
  for (int i = kFrom; i < kTo; ++i) {
    const int column = 8 * (i / 4 - kFrom / 4) + i % 2, r = (i / 2) % 2;
    const bool near = column > mask.window[r] || column < mask.sink;
    if (!near || column < mask.low || column > mask.causal[r]) s[i] = -INFINITY;
  }
}

// The mask of an item's range in a tile whose first key is `first`, for a lane whose first column
// is `column` and whose rows lie at `positions`, counted from the item's first.
__device__ __forceinline__ ColumnMask range_mask(const Item& item, int first, int column,
                                                 const int (&positions)[2]) {
  ColumnMask mask;
  mask.low = item.low - first - column;
  mask.sink = item.sink_end - first - column;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    mask.causal[r] = item.position + positions[r] - first - column;
    mask.window[r] = mask.causal[r] - item.window;
  }
  return mask;
}

}  // namespace trianglemix

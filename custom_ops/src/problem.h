// One call of an attention operator as a kernel sees it: pointers, sizes and the pattern, nothing
// of ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"

namespace trianglemix {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t BytesOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Head sizes are multiples of the one, up to the other.
constexpr int64_t kHeadSizeStep = 8;
constexpr int64_t kMaxHeadSize = 256;

// Turns the first `size` numbers of each new query and key by an angle that its slot in the cache
// gives: pairs (i, i + size / 2), or neighbours (2i, 2i + 1).
struct Rotation {
  const void* cos;  // [positions, size / 2]; null: no rotation
  const void* sin;
  int64_t positions;
  int64_t size;
  bool interleaved;
};

// Numbers from a page of a pool to the next, from a page's head to the next, from slot to slot.
struct PageStrides {
  int64_t page, head, slot;
};

// Keys and values that lie by pages: slot j of batch row b is slot j % size of page
// table[b * row_pages + j / size] of two pools, which begin at `present_key` and `present_value`.
// Only entries of slots below L_b are read.
struct KeyPages {
  const int32_t* table;  // [B, row_pages]; null: they lie in one piece
  int64_t row_pages;
  int64_t size;   // slots of a page
  int64_t count;  // pages of a pool
  PageStrides key, value;
};

// Row b's keys end at L_b = seqlens_k[b] + 1; its new tokens start at max(0, L_b - S).
// All tensors are contiguous in the layouts given, but for the new tokens: their rows lie `stride`
// numbers apart, since queries, keys and values may come packed as one tensor. Pointers live where
// the kernel runs, lengths included (device memory on CUDA, where the host never reads them);
// `total` is known to the host. An operator that has more to say extends this.
struct AttentionProblem {
  DType dtype;
  Pattern pattern;
  float scale;    // already resolved: never 0
  float softcap;  // 0 = off

  int64_t batch;             // B
  int64_t query_length;      // S, new tokens
  int64_t num_heads;         // H
  int64_t kv_num_heads;      // G, divides H
  int64_t head_size;         // D,  multiple of 8, at most 256
  int64_t value_head_size;   // Dv, multiple of 8, at most 256
  int64_t past_capacity;     // P, slots of past_key / past_value (0 without a past)
  int64_t present_capacity;  // T = max(P, total), slots of present_key / present_value
  int64_t total;             // largest L_b, as the caller says

  Rotation rotation;
  int64_t query_stride;  // H*D, or more where packed
  int64_t key_stride;
  int64_t value_stride;

  const void* query;       // [B, S, H*D]
  const void* key;         // [B, S, G*D]; null: the new tokens are in the cache already (CUDA only)
  const void* value;       // [B, S, G*Dv]; null with `key`
  const void* past_key;    // [B, G, P, D]   null without a past; may equal present_key
  const void* past_value;  // [B, G, P, Dv]
  void* output;            // [B, S, H*Dv]
  void* present_key;       // [B, G, T, D]
  void* present_value;     // [B, G, T, Dv]

  const int32_t* seqlens_k;      // [B], L_b - 1
  const int32_t* prompt_length;  // [B], N; null = L_b
  const int32_t* first_valid;    // [B]; null = 0

  KeyPages pages;  // CUDA, BlockSparseAttention: then `key` and `first_valid` are null

  // Else the cache, `present_*`, is read alone, and `past_*` are not looked at.
  bool appends() const { return key != nullptr; }
  bool is_paged() const { return pages.table != nullptr; }

  // Of row b, where the lengths are in host memory.
  int64_t end(int64_t b) const { return int64_t{seqlens_k[b]} + 1; }
  int64_t prompt_end(int64_t b) const {
    return prompt_length != nullptr ? prompt_length[b] : end(b);
  }
  int64_t first_key(int64_t b) const { return first_valid != nullptr ? first_valid[b] : 0; }

  // Attention reads its queries in place where it can. Else the step before, which appends to the
  // cache, leaves them in `output` ([B, S, H*D], Dv = D): each tile reads its queries there before
  // it writes its results over them.
  bool prepares_queries() const {
    return rotation.cos != nullptr || query_stride != num_heads * head_size;
  }
  AttentionProblem with_prepared_queries() const {
    AttentionProblem prepared = *this;
    prepared.query = output;
    prepared.query_stride = num_heads * head_size;
    prepared.rotation = {};
    return prepared;
  }
};

}  // namespace trianglemix

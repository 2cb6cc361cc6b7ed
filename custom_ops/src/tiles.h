// Which rows of a call are live and which keys they visit: integer arithmetic only, for every
// device. The Ascend operator's package takes a copy of this file, so it includes no other.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TRIANGLEMIX_HOST_DEVICE __host__ __device__
#elif !defined(TRIANGLEMIX_HOST_DEVICE)  // the Ascend kernel's is __aicore__
#define TRIANGLEMIX_HOST_DEVICE
#endif

namespace trianglemix {

// Functions here have internal linkage: they are compiled under several instruction sets, and the
// linker must not pick one copy for all.
#define TRIANGLEMIX_TILES static inline TRIANGLEMIX_HOST_DEVICE

template <class A, class B>
TRIANGLEMIX_TILES constexpr auto Smaller(A a, B b) -> decltype(a + b) {
  return a < b ? a : b;
}
template <class A, class B>
TRIANGLEMIX_TILES constexpr auto Larger(A a, B b) -> decltype(a + b) {
  return a > b ? a : b;
}
template <class A, class B, class C>
TRIANGLEMIX_TILES constexpr auto Clamp(A x, B low, C high) -> decltype(x + low + high) {
  return x < low ? low : (x > high ? high : x);
}
template <class A, class B>
TRIANGLEMIX_TILES constexpr auto CeilDivide(A a, B b) -> decltype(a + b) {
  return (a + b - 1) / b;
}

// keep(i, j) = j <= i and (j - first_valid < sink or i - j < window or i >= N - last);
// window == kDenseWindow keeps everything.
constexpr int64_t kDenseWindow = -1;

struct Pattern {
  int64_t sink;
  int64_t window;
  int64_t last;
};

// The new tokens of one row of the batch. Tokens outside [first_token, end_token) keep no key.
// Those before dense_token are streaming (sinks and window), the others keep every key.
struct BatchRow {
  int64_t start;        // position of token 0
  int64_t end;          // L, end of the keys
  int64_t first_valid;  // first key
  int64_t first_token;
  int64_t dense_token;
  int64_t end_token;
};

TRIANGLEMIX_TILES BatchRow DescribeRow(const Pattern& pattern, int64_t query_length, int64_t end,
                                       int64_t prompt_length, int64_t first_valid) {
  BatchRow row;
  row.start = Larger(0, end - query_length);
  row.end = end;
  row.first_valid = first_valid;
  row.end_token = Smaller(query_length, end - row.start);
  row.first_token = Clamp(first_valid - row.start, 0, row.end_token);
  const int64_t dense_token = prompt_length - pattern.last - row.start;
  row.dense_token = pattern.window == kDenseWindow
                        ? row.first_token
                        : Clamp(dense_token, row.first_token, row.end_token);
  return row;
}

// Half-open.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

// Disjoint and ascending; `sink` is empty where both would touch.
struct KeyRanges {
  KeyRange sink;
  KeyRange window;
};

// Keys that the rows at positions [first, last] keep, between them: a row keeps a part.
TRIANGLEMIX_TILES KeyRanges KeysOfRows(const Pattern& pattern, bool dense, int64_t first,
                                       int64_t last, int64_t first_valid) {
  const int64_t sink_end = first_valid + pattern.sink;
  const int64_t window_begin = first - pattern.window + 1;
  if (dense || window_begin <= sink_end)
    return {{first_valid, first_valid}, {first_valid, last + 1}};
  return {{first_valid, sink_end}, {window_begin, last + 1}};
}

}  // namespace trianglemix

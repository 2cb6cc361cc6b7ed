// A ring of buffers between a producer and its consumers.
#pragma once

#include <cstdint>

namespace trianglemix {

// Position in a ring of `kSize` buffers; `parity` flips with every round.
template <int kSize>
struct Ring {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kSize) index = 0, parity ^= 1;
  }
};

}  // namespace trianglemix

// The node's inputs, outputs and attributes by index: custom_ops/contract.py, INPUTS and after.
// Never compiled by CANN.
#pragma once

#include <cstddef>

namespace triangle {

enum Input : size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kSeqlens,
  kTotalLength,
  kPromptLength,
  kFirstValid,
};

enum Output : size_t { kAttention, kPresentKey, kPresentValue };

enum Attribute : size_t { kHeads, kKvHeads, kScale, kSoftcap, kSink, kWindow, kLast };

}  // namespace triangle

// What the host decides for one call and the kernel reads: sizes, pattern, tile shape, workspace.
// Never compiled by CANN.
#pragma once

#include <cstdint>

// Plain data: no functions, pointers or initial values (the host fills every field).
struct TriangleAttentionTilingData {
  int64_t batch;          // B
  int64_t queryLength;    // S, new tokens
  int64_t kvHeads;        // G
  int64_t groupHeads;     // H / G, query heads that share a key head
  int64_t headSize;       // D
  int64_t valueSize;      // Dv
  int64_t pastSlots;      // P, 0 without a past
  int64_t presentSlots;   // T
  int64_t sink;           // num_sink_tokens
  int64_t window;         // sliding_window_size, -1 = dense
  int64_t last;           // num_last_tokens
  int64_t tileTokens;     // new tokens of a tile
  int64_t tileRows;       // most rows of a tile: a token's rows are the heads of one group
  int64_t workspaceCore;  // bytes of workspace of one cube core
  float scale;            // resolved: never 0
  float softcap;          // 0 = off
  int32_t hasPromptLength;
  int32_t hasFirstValid;
};

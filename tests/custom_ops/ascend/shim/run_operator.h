// The operator's tiling and one of its kernels behind one C function, for the tests. The including
// file defines the kernels.
#pragma once

#include "launch.h"

using Kernel = void (*)(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR,
                        GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR);
extern const Kernel kKernels[];

#include "triangle_attention_sizes.h"
#undef TRIANGLEMIX_HOST_DEVICE

namespace {

constexpr int kArrays = 12;

int Report(int code, const std::string& text, char* message, int64_t size) {
  text.copy(message, size - 1);
  message[std::min<int64_t>(static_cast<int64_t>(text.size()), size - 1)] = 0;
  return code;
}

}  // namespace

// `numbers` are the members of CallSizes from batch to last; arrays are the kernel's arguments
// without total_sequence_length: inputs, outputs; null = absent. `bytes` are their sizes. An
// aliased past is said by giving the present's address. Returns 0, 1 (a fault), 2 (refused).
extern "C" int ascend_run(const int64_t* numbers, const float* scale, void** arrays,
                          const int64_t* bytes, int64_t cores, int64_t kernel, int64_t* peak,
                          char* message, int64_t message_size) {
  const triangle::CallSizes sizes = {
      numbers[0], numbers[1], numbers[2],           numbers[3],          numbers[4],  numbers[5],
      numbers[6], numbers[7], numbers[8],           numbers[9],          numbers[10], numbers[11],
      scale[0],   scale[1],   arrays[6] != nullptr, arrays[7] != nullptr};
  TriangleAttentionTilingData data;
  std::string refusal = triangle::MakeTiling(sizes, data);
  if (refusal.empty()) refusal = triangle::CheckMemories(data, triangle::kMemories910b);
  if (!refusal.empty()) return Report(2, refusal, message, message_size);
  shim::Machine machine;
  machine.blocks = static_cast<int>(cores);
  uint8_t* at[kArrays] = {};
  for (int i = 0; i < kArrays - 1; ++i) {
    if (arrays[i] == nullptr) continue;
    for (int j = 0; j < i; ++j)
      if (arrays[j] == arrays[i]) at[i] = at[j];
    if (at[i] != nullptr) continue;
    machine.global.push_back(
        std::make_unique<shim::Memory>("array " + std::to_string(i), bytes[i]));
    shim::Memory& memory = *machine.global.back();
    at[i] = memory.bytes.data();
    const bool given = i < 8;
    if (given) std::memcpy(at[i], arrays[i], bytes[i]);
    for (shim::Granule& granule : memory.granules) granule.written = given;
  }
  machine.global.push_back(
      std::make_unique<shim::Memory>("the workspace", cores * data.workspaceCore));
  at[11] = machine.global.back()->bytes.data();
  uint8_t* tiling = reinterpret_cast<uint8_t*>(&data);
  try {
    shim::Launch(machine, [&] {
      kKernels[kernel](at[0], at[1], at[2], at[3], at[4], at[5], nullptr, at[6], at[7], at[8],
                       at[9], at[10], at[11], tiling);
    });
  } catch (const shim::Fault& fault) {
    return Report(1, fault.what(), message, message_size);
  }
  for (int i = 8; i < kArrays - 1; ++i) std::memcpy(arrays[i], at[i], bytes[i]);
  const triangle::Memories used = triangle::MemoriesOf(data);
  const int64_t said[] = {used.unified, used.l1, used.l0a, used.l0b, used.l0c};
  for (int kind = 0; kind < shim::kKinds; ++kind) {
    peak[kind] = machine.peak[kind];
    peak[shim::kKinds + kind] = said[kind];
  }
  return 0;
}

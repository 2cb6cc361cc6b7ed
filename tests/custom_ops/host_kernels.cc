// The CUDA library's C interface on the host: attention by its definition, one row at a time, so
// that the hand-over from torch is tested where there is no GPU. Any float type, any layout that
// the interface can say; anything that torch's side must not hand over is an error.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "block_sparse/problem.h"
#include "cuda/cuda_library.h"

#ifndef HOST_ABI
#define HOST_ABI TRIANGLEMIX_CUDA_ABI
#endif

namespace trianglemix {
namespace {

constexpr uintptr_t kStream = 77;
constexpr size_t kWorkspace = 4096;

float Read(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[i];
  if (dtype == DType::kFloat16) return static_cast<const _Float16*>(base)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(base)[i]} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void Write(void* base, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) static_cast<float*>(base)[i] = x;
  if (dtype == DType::kFloat16) static_cast<_Float16*>(base)[i] = static_cast<_Float16>(x);
  if (dtype != DType::kBFloat16) return;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  static_cast<uint16_t*>(base)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Numbers from `present_key` or `present_value` to slot j of head g of batch row b.
int64_t Place(const AttentionProblem& p, bool key, int64_t b, int64_t g, int64_t j) {
  if (!p.is_paged()) {
    const int64_t size = key ? p.head_size : p.value_head_size;
    return ((b * p.kv_num_heads + g) * p.present_capacity + j) * size;
  }
  const PageStrides& strides = key ? p.pages.key : p.pages.value;
  const int64_t page = p.pages.table[b * p.pages.row_pages + j / p.pages.size];
  return page * strides.page + g * strides.head + j % p.pages.size * strides.slot;
}

float Score(const AttentionProblem& p, int64_t query, int64_t key) {
  double sum = 0;
  for (int64_t d = 0; d < p.head_size; ++d) {
    sum += double{Read(p.query, p.dtype, query + d)} * Read(p.present_key, p.dtype, key + d);
  }
  const double score = sum * p.scale;
  return p.softcap > 0 ? p.softcap * std::tanh(score / p.softcap) : score;
}

bool Keeps(const AttentionProblem& p, int64_t b, int64_t i, int64_t j) {
  const int64_t first = p.first_key(b);
  if (j < first || j > i) return false;
  const Pattern& pattern = p.pattern;
  return pattern.window == kDenseWindow || j - first < pattern.sink || i - j < pattern.window ||
         i >= p.prompt_length[b] - pattern.last;
}

// Row i of head h: token s of batch row b.
void Attend(const AttentionProblem& p, int64_t b, int64_t h, int64_t s, int64_t i) {
  const int64_t g = h / (p.num_heads / p.kv_num_heads), token = b * p.query_length + s;
  const int64_t query = token * p.query_stride + h * p.head_size;
  std::vector<double> sums(p.value_head_size);
  double total = 0, most = -INFINITY;
  for (int64_t j = 0; j <= i; ++j) {
    if (Keeps(p, b, i, j)) most = std::fmax(most, Score(p, query, Place(p, true, b, g, j)));
  }
  for (int64_t j = 0; j <= i; ++j) {
    if (!Keeps(p, b, i, j)) continue;
    const double weight = std::exp(Score(p, query, Place(p, true, b, g, j)) - most);
    total += weight;
    for (int64_t d = 0; d < p.value_head_size; ++d) {
      sums[d] += weight * Read(p.present_value, p.dtype, Place(p, false, b, g, j) + d);
    }
  }
  const int64_t output = (token * p.num_heads + h) * p.value_head_size;
  for (int64_t d = 0; d < p.value_head_size; ++d) {
    Write(p.output, p.dtype, output + d, total > 0 ? sums[d] / total : 0);
  }
}

const char* Run(const AttentionProblem& p, void* workspace, void* stream) {
  if (reinterpret_cast<uintptr_t>(stream) != kStream) return "not on the current stream";
  if (p.appends() || p.value != nullptr) return "appends to a cache that is whole";
  if (p.is_paged() == (p.first_valid != nullptr)) return "pages begin at slot 0, other keys do not";
  if (p.is_paged() && p.pages.row_pages * p.pages.size < p.present_capacity) return "a short table";
  if (p.rotation.cos != nullptr || p.prepares_queries()) return "queries are not as they should be";
  const void* pointers[] = {p.query, p.present_key, p.present_value, p.output};
  for (const void* x : pointers) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "an address that loads do not take";
  }
  std::memset(workspace, 0xab, kWorkspace);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = p.end(b) <= p.present_capacity ? p.end(b) : 0;
    const int64_t start = end > p.query_length ? end - p.query_length : 0;
    for (int64_t s = 0; s < p.query_length; ++s) {
      const int64_t i = start + s < end ? start + s : -1;  // -1: a row without keys
      for (int64_t h = 0; h < p.num_heads; ++h) Attend(p, b, h, s, i);
    }
  }
  return nullptr;
}

size_t WorkspaceBytes(const AttentionProblem*) { return kWorkspace; }

const char* RunTriangle(const AttentionProblem* problem, void* workspace, void* stream) {
  return Run(*problem, workspace, stream);
}

// Its dense mode alone; of another rule it only says that it arrived.
const char* RunBlocks(const AttentionProblem* base, void* workspace, void* stream) {
  const auto& problem = static_cast<const BlockSparseProblem&>(*base);
  static char text[200];
  if (problem.mass < 1) {
    std::snprintf(text, sizeof(text), "mass %g least %lld pattern %lld %lld %lld mask %d",
                  problem.mass, (long long)problem.min_length, (long long)problem.pattern.sink,
                  (long long)problem.pattern.window, (long long)problem.pattern.last,
                  problem.block_mask != nullptr);
    return text;
  }
  AttentionProblem dense = problem;
  dense.pattern.window = kDenseWindow;
  return Run(dense, workspace, stream);
}

const CudaKernels kTriangle{HOST_ABI, sizeof(AttentionProblem), WorkspaceBytes, RunTriangle};
const CudaKernels kBlocks{HOST_ABI, sizeof(BlockSparseProblem), WorkspaceBytes, RunBlocks};

}  // namespace
}  // namespace trianglemix

extern "C" const trianglemix::CudaKernels* trianglemix_cuda_library() {
  return &trianglemix::kTriangle;
}
extern "C" const trianglemix::CudaKernels* trianglemix_cuda_block_sparse() {
  return &trianglemix::kBlocks;
}

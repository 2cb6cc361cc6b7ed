// Plans a call and enqueues its kernels: append, then attention.
#include "call.h"
#include "partial.cuh"

namespace trianglemix {

constexpr int64_t kMaxHead = int64_t{4} << 30;  // bytes

const char* check_sizes(const AttentionProblem& p) {
  if (p.present_capacity >= kMaxTokens || p.query_length >= kMaxTokens) {
    return "the CUDA kernels take caches and prompts of fewer than 2^29 tokens";
  }
  if (p.present_capacity * Larger(p.head_size, p.value_head_size) * BytesOf(p.dtype) >= kMaxHead) {
    return "the CUDA kernels take caches of less than 4 GiB of keys or values a head";
  }
  if (p.batch > 65535) return "the CUDA kernels take at most 65535 batch rows";
  return nullptr;
}

namespace {

// Loads are of 16 bytes, 8 numbers.
bool steps_of_loads(const PageStrides& strides) {
  const int64_t all[] = {strides.page, strides.head, strides.slot};
  for (const int64_t x : all) {
    if (x <= 0 || x % 8 != 0) return false;
  }
  return true;
}

}  // namespace

const char* check_pages(const AttentionProblem& p, Kernel kernel) {
  const KeyPages& pages = p.pages;
  if (!p.is_paged()) return nullptr;
  if (kernel != Kernel::kSm90) {
    return "keys by pages are read on Hopper GPUs (compute capability 9.0) alone, in float16 and "
           "bfloat16, with a positive scale and head sizes 64, 96, 128 and 256 that values share";
  }
  if (p.appends() || p.first_valid != nullptr) {
    return "keys by pages begin at slot 0 and hold the new tokens already: first_valid and key "
           "must be null";
  }
  if (pages.size != 16 && pages.size != 32 && pages.size != 64 && pages.size != 128) {
    return "the CUDA kernels take pages of 16, 32, 64 or 128 slots";
  }
  if (pages.row_pages * pages.size < p.present_capacity || pages.row_pages >= kMaxTokens ||
      pages.count < 1 || pages.count > INT32_MAX) {
    return "the page table's rows must hold present_capacity slots, and a pool 1 to 2^31 - 1 pages";
  }
  if (!steps_of_loads(pages.key) || !steps_of_loads(pages.value)) {
    return "strides of keys by pages must be positive multiples of 8 numbers";
  }
  return nullptr;
}

size_t whole_steps(size_t bytes) {
  constexpr size_t kStep = size_t{32} << 20;
  return (bytes + kStep - 1) / kStep * kStep;
}

size_t attention_workspace(const AttentionProblem& problem) {
  Device device;
  if (query_device(&device) || check_sizes(problem) || problem.batch * problem.query_length == 0) {
    return 0;
  }
  return whole_steps(scratch_bytes(make_plan(problem, choose_kernel(problem, device), device)));
}

cudaError_t launch_attention(Kernel kernel, const AttentionProblem& problem, const Plan& plan,
                             const Scratch& scratch, const Device& device, cudaStream_t stream) {
  switch (kernel) {
    case Kernel::kSm90:
      return launch_sm90(problem, plan, scratch, device, stream);
    case Kernel::kSm80:
      return launch_sm80(problem, plan, scratch, stream);
    default:
      return launch_float32(problem, plan, scratch, stream);
  }
}

const char* run_attention(const AttentionProblem& problem, void* workspace, cudaStream_t stream) {
  Device device;
  if (const char* error = query_device(&device)) return error;
  if (const char* error = check_sizes(problem)) return error;
  if (problem.is_paged()) return "of the CUDA kernels, BlockSparseAttention's alone read pages";
  if (problem.batch * problem.query_length == 0) return nullptr;
  const Kernel kernel = choose_kernel(problem, device);
  const Plan plan = make_plan(problem, kernel, device);
  const Scratch scratch = scratch_at(plan, workspace);
  const int counters = 1 + plan.batch * plan.groups * plan.split_tiles * kTileParts;
  cudaError_t e = launch_append(problem, plan,
                                {scratch.next_item, counters, scratch.items, plan.items}, stream);
  const AttentionProblem ready =
      problem.prepares_queries() ? problem.with_prepared_queries() : problem;
  if (e == cudaSuccess) e = launch_attention(kernel, ready, plan, scratch, device, stream);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace trianglemix

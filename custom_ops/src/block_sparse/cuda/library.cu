// BlockSparseAttention's symbol: append, choice of blocks, attention, and the mask where asked for.
#include "../../cuda/call.h"
#include "choice.h"

namespace trianglemix {
namespace {

// A call whose sizes alone say that all its tiles are dense: decode steps, a rule that keeps all.
// The dense mode's kernels, which it goes to, read no pages.
bool is_dense(const BlockSparseProblem& problem) {
  if (problem.is_paged()) return false;
  const BlockRule rule{problem.pattern, problem.mass, problem.min_length};
  return rule.is_dense() || problem.query_length < kSampleStep;
}

AttentionProblem dense_problem(const BlockSparseProblem& problem) {
  AttentionProblem dense = problem;
  dense.pattern.window = kDenseWindow;
  return dense;
}

// Everything of a call but its pointers into scratch.
struct Work {
  Kernel kernel;
  Plan attention;
  ChoicePlan choice;

  Work(const BlockSparseProblem& problem, const Device& device)
      : kernel(choose_kernel(problem, device)),
        attention(make_block_plan(problem, kernel, device)),
        choice(make_choice_plan(problem, kernel, attention, device)) {}
};

const BlockSparseProblem& own(const AttentionProblem* problem) {
  return static_cast<const BlockSparseProblem&>(*problem);
}

size_t workspace_bytes(const AttentionProblem* base) {
  const BlockSparseProblem& problem = own(base);
  if (is_dense(problem)) return attention_workspace(dense_problem(problem));
  Device device;
  if (query_device(&device) || check_sizes(problem) || problem.batch * problem.query_length == 0) {
    return 0;
  }
  const Work work(problem, device);
  return whole_steps(scratch_bytes(work.attention) + choice_bytes(work.choice, work.kernel));
}

cudaError_t launch_choice(Kernel kernel, const BlockSparseProblem& problem,
                          const ChoiceParams& params, cudaStream_t stream) {
  switch (kernel) {
    case Kernel::kSm90:
      return launch_choice_sm90(problem, params, stream);
    case Kernel::kSm80:
      return launch_choice_sm80(problem, params, stream);
    default:
      return launch_choice_float32(params, stream);
  }
}

cudaError_t enqueue(const BlockSparseProblem& problem, char* workspace, const Device& device,
                    cudaStream_t stream) {
  const auto [kernel, plan, choice] = Work(problem, device);
  Scratch scratch = scratch_at(plan, workspace);
  const ChoiceScratch chosen = choice_scratch_at(choice, kernel, workspace + scratch_bytes(plan));
  const int counters = 1 + plan.batch * plan.groups * plan.split_tiles * kTileParts;
  cudaError_t e = launch_append(problem, plan, {scratch.next_item, counters, nullptr, 0}, stream);
  BlockSparseProblem ready = problem;
  if (problem.prepares_queries()) {
    static_cast<AttentionProblem&>(ready) = problem.with_prepared_queries();
  }
  const ChoiceParams params{
      choice,      chosen, scratch.items, lengths_of(ready), ready.query, ready.present_key,
      ready.output};
  if (e == cudaSuccess) e = launch_choice(kernel, ready, params, stream);
  scratch.bits = chosen.bits;
  scratch.words = choice.words;
  if (e == cudaSuccess) e = launch_attention(kernel, ready, plan, scratch, device, stream);
  if (e != cudaSuccess || problem.block_mask == nullptr) return e;
  return launch_block_mask(problem, params, stream);
}

cudaError_t enqueue_dense_mask(const BlockSparseProblem& problem, const Device& device,
                               cudaStream_t stream) {
  ChoiceParams params{};
  params.plan = Work(problem, device).choice;
  params.lengths = lengths_of(problem);
  return launch_block_mask(problem, params, stream);
}

const char* run(const AttentionProblem* base, void* workspace, void* stream_pointer) {
  const BlockSparseProblem& problem = own(base);
  Device device;
  if (const char* error = query_device(&device)) return error;
  if (const char* error = check_sizes(problem)) return error;
  if (const char* error = check_pages(problem, choose_kernel(problem, device))) return error;
  if (problem.batch * problem.query_length == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  cudaError_t e = cudaSuccess;
  if (!is_dense(problem)) {
    e = enqueue(problem, static_cast<char*>(workspace), device, stream);
  } else {
    if (const char* error = run_attention(dense_problem(problem), workspace, stream)) return error;
    if (problem.block_mask != nullptr) e = enqueue_dense_mask(problem, device, stream);
  }
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

const CudaKernels kKernels{TRIANGLEMIX_CUDA_ABI, sizeof(BlockSparseProblem), workspace_bytes, run};

}  // namespace
}  // namespace trianglemix

extern "C" __attribute__((visibility("default"))) const trianglemix::CudaKernels*
trianglemix_cuda_block_sparse() {
  return &trianglemix::kKernels;
}

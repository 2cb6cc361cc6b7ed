// The operator BlockSparseAttention: its entry, and one node of it.
#include <algorithm>

#include "../binding/run.h"
#include "cpu.h"

namespace trianglemix {
namespace {

constexpr Pattern kDefaultPattern = {8, 128, 128};
constexpr float kDefaultMass = 0.95f;
constexpr int64_t kDefaultMinLength = 4096;
// Prompts are shorter, so that a larger one means the same.
constexpr int64_t kUnbounded = int64_t{1} << 32;

constexpr const char* kCudaEntry = "trianglemix_cuda_block_sparse";

constexpr size_t kBlockMask = kOutputCount;
constexpr Port kBlockMaskPort = {"block_mask", ort::ElementType::kUint8, false, false};

BlockRule ReadRule(const ort::Api& api, const OrtKernelInfo* info, const Pattern& pattern) {
  BlockRule rule{pattern, kDefaultMass, kDefaultMinLength};
  ReadFloat(api, info, "mass", &rule.mass);
  ReadInt(api, info, "min_length", &rule.min_length);
  if (!(rule.mass > 0.0f && rule.mass <= 1.0f))
    Refuse("mass is " + std::to_string(rule.mass) + ", but must be in (0, 1]");
  if (rule.min_length < 0)
    Refuse("min_length is " + Text(rule.min_length) + ", but must be 0 or more");
  rule.min_length = std::min(rule.min_length, kUnbounded);
  return rule;
}

class BlockSparseKernel final : public Kernel {
 public:
  BlockSparseKernel(const KernelKind& kind, const OrtKernelInfo* info)
      : Kernel(kind),
        attributes_(ReadAttributes(kind.api, info, kDefaultPattern)),
        rule_(ReadRule(kind.api, info, attributes_.pattern)) {
    if (kind.device == Device::kCuda)
      cuda_ = &LoadCudaKernels(kCudaEntry, sizeof(BlockSparseProblem));
  }

  void Compute(OrtKernelContext* context) const override {
    const ort::Api& api = kind.api;
    const Inputs inputs = ReadInputs(api, context);
    BlockSparseProblem problem{MakeProblem(attributes_, kind.dtype, inputs), rule_.mass,
                               rule_.min_length, nullptr};
    if (cuda_ == nullptr) CheckLengths(problem);
    SetOutputs(api, context, inputs, &problem);
    const int64_t tiles = CeilDivide(problem.present_capacity, kBlock);
    const Tensor mask = MakeOptionalOutput(api, context, kBlockMask, kBlockMaskPort.name,
                                           {problem.batch, problem.num_heads, tiles, tiles});
    problem.block_mask = static_cast<uint8_t*>(mask.data);
    if (cuda_ != nullptr) return RunOnCuda(api, context, *cuda_, problem, inputs[kQuery].value);
    SessionThreads threads(api, context);
    if (const char* message = cpu::RunBlockSparse(problem, threads))
      throw ort::Error(ort::ErrorCode::kFail, message);
  }

 private:
  const Attributes attributes_;
  const BlockRule rule_;
  const CudaKernels* cuda_ = nullptr;  // null on the CPU
};

}  // namespace

Operator BlockSparseAttention() {
  const auto make = [](const KernelKind& kind,
                       const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
    return std::make_unique<BlockSparseKernel>(kind, info);
  };
  std::vector<Port> outputs(kOutputs.begin(), kOutputs.end());
  outputs.push_back(kBlockMaskPort);
  return {"BlockSparseAttention",
          {kInputs.begin(), kInputs.end()},
          outputs,
          true,
          make,
          InferOutputShapes,
          CacheInplace};
}

}  // namespace trianglemix

// The operator TriangleAttention: its entry, and one node of it.
#include "../binding/run.h"
#include "cpu.h"

namespace trianglemix {
namespace {

constexpr Pattern kDefaultPattern = {8, 512, 128};
constexpr const char* kCudaEntry = "trianglemix_cuda_library";

class TriangleKernel final : public Kernel {
 public:
  TriangleKernel(const KernelKind& kind, const OrtKernelInfo* info)
      : Kernel(kind), attributes_(ReadAttributes(kind.api, info, kDefaultPattern)) {
    if (kind.device == Device::kCuda)
      cuda_ = &LoadCudaKernels(kCudaEntry, sizeof(AttentionProblem));
  }

  void Compute(OrtKernelContext* context) const override {
    const ort::Api& api = kind.api;
    const Inputs inputs = ReadInputs(api, context);
    AttentionProblem problem = MakeProblem(attributes_, kind.dtype, inputs);
    if (cuda_ == nullptr) CheckLengths(problem);
    SetOutputs(api, context, inputs, &problem);
    if (cuda_ != nullptr) return RunOnCuda(api, context, *cuda_, problem, inputs[kQuery].value);
    SessionThreads threads(api, context);
    if (const char* message = cpu::RunTriangle(problem, threads))
      throw ort::Error(ort::ErrorCode::kFail, message);
  }

 private:
  const Attributes attributes_;
  const CudaKernels* cuda_ = nullptr;  // null on the CPU
};

}  // namespace

Operator TriangleAttention() {
  const auto make = [](const KernelKind& kind,
                       const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
    return std::make_unique<TriangleKernel>(kind, info);
  };
  return {"TriangleAttention",
          {kInputs.begin(), kInputs.end()},
          {kOutputs.begin(), kOutputs.end()},
          true,
          make,
          InferOutputShapes,
          CacheInplace};
}

}  // namespace trianglemix

// The operator TriangleAttention: its entry, and one node of it.
#include "../binding/run.h"

namespace trianglemix {
namespace {

constexpr Pattern kDefaultPattern = {8, 512, 128};
constexpr const char* kCudaEntry = "trianglemix_cuda_library";

class TriangleKernel final : public Kernel {
 public:
  explicit TriangleKernel(const Node& node)
      : api_(node.api),
        dtype_(node.dtype),
        attributes_(ReadAttributes(node.api, node.info, kDefaultPattern)) {
    if (node.device == Device::kCuda)
      cuda_ = &LoadCudaKernels(kCudaEntry, sizeof(AttentionProblem));
  }

  void Compute(OrtKernelContext* context) const override {
    const Inputs inputs = ReadInputs(api_, context);
    AttentionProblem problem = MakeProblem(attributes_, dtype_, inputs);
    if (cuda_ == nullptr) CheckLengths(problem);
    SetOutputs(api_, context, inputs, &problem);
    if (cuda_ != nullptr) return RunOnCuda(api_, context, *cuda_, problem, inputs[kQuery].value);
    SessionThreads threads(api_, context);
    if (const char* message = cpu::Run(problem, threads))
      throw ort::Error(ort::ErrorCode::kFail, message);
  }

 private:
  const ort::Api api_;
  const DType dtype_;
  const Attributes attributes_;
  const CudaKernels* cuda_ = nullptr;  // null on the CPU
};

}  // namespace

Operator TriangleAttention() {
  const auto make = [](const Node& node) -> std::unique_ptr<Kernel> {
    return std::make_unique<TriangleKernel>(node);
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

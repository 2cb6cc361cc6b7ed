// A second operator for the tests: `output = x * factor`, the factor read on the host.
#include "../binding/run.h"

namespace trianglemix {
namespace {

class ToyKernel final : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OrtKernelContext* context) const override {
    const ort::Api& api = kind.api;
    const OrtValue* values[2] = {};
    for (size_t i = 0; i < 2; ++i) api.Check(api.KernelContext_GetInput(context, i, &values[i]));
    const Tensor x = ReadTensor(api, values[0], "x"), factor = ReadTensor(api, values[1], "factor");
    const Tensor output = MakeOutput(api, context, 0, "output", x.shape);
    const int32_t times = *static_cast<const int32_t*>(factor.data);
    if (times < 1) Refuse("factor is " + Text(times) + ", but must be 1 or more");
    if (kind.dtype != DType::kFloat32) Refuse("this toy takes float32 only");
    int64_t count = 1;
    for (size_t i = 0; i < x.shape.rank; ++i) count *= x.shape.dims[i];
    for (int64_t i = 0; i < count; ++i)
      static_cast<float*>(output.data)[i] = static_cast<const float*>(x.data)[i] * times;
  }
};

}  // namespace

Operator ToyOperator() {
  const auto make = [](const KernelKind& kind, const OrtKernelInfo*) -> std::unique_ptr<Kernel> {
    return std::make_unique<ToyKernel>(kind);
  };
  return {"ToyOperator",
          {{"x", kKernelType, true, false}, {"factor", ort::ElementType::kInt32, true, true}},
          {{"output", kKernelType, true, false}},
          false,
          make,
          nullptr,
          nullptr};
}

}  // namespace trianglemix

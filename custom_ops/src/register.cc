// Registers the operators with ONNX Runtime: an OrtCustomOp for each data type and device.
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "binding/cuda_loader.h"
#include "operator.h"

namespace trianglemix {
namespace {

using ort::Characteristic;
using ort::CustomOp;
using ort::MemoryType;

constexpr const char* kDomain = "trianglemix";

const std::vector<Operator>& Operators() {
#define TRIANGLEMIX_OPERATOR(name) name(),
  static const auto* operators = new std::vector<Operator>{
#include "operators.inc"
  };
#undef TRIANGLEMIX_OPERATOR
  return *operators;
}

struct Runtime {
  const OrtApi* table;
  bool infers_shapes;
};

// Up to 1.22 a shape inference function is called with null pointers for absent optional inputs,
// before our code is reached: without one there is no shape inference, and no crash.
constexpr int kFirstMinorWithSafeInference = 24;

bool InfersShapes(const char* version) {
  int major = 0, minor = 0;
  if (std::sscanf(version, "%d.%d", &major, &minor) != 2) return false;
  return major > 1 || minor >= kFirstMinorWithSafeInference;
}

Characteristic CharacteristicOf(const Port& port) {
  return port.required ? Characteristic::kRequired : Characteristic::kOptional;
}

struct Registration : CustomOp {
  Registration(const Runtime& runtime, const Operator& entry, DType dtype, Device device);

  bool on_cuda() const { return kind.device == Device::kCuda; }

  const Operator& entry;
  KernelKind kind;
};

const Registration& Self(const CustomOp* op) { return *static_cast<const Registration*>(op); }

// CUDA graphs freeze inputs that the host reads.
MemoryType InputMemory(const CustomOp* op, size_t index) {
  const bool host = Self(op).on_cuda() && Self(op).entry.inputs[index].on_host;
  return host ? MemoryType::kCpuInput : MemoryType::kDefault;
}

OrtStatus* MakeKernel(const CustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const KernelKind& kind = Self(op).kind;
  return kind.api.Guard(kind.operator_name,
                        [&] { *kernel = Self(op).entry.make_kernel(kind, info).release(); });
}

OrtStatus* RunKernel(void* kernel, OrtKernelContext* context) {
  const auto* self = static_cast<const Kernel*>(kernel);
  return self->kind.api.Guard(self->kind.operator_name, [&] { self->Compute(context); });
}

OrtStatus* InferShapes(const CustomOp* op, OrtShapeInferContext* context) {
  const KernelKind& kind = Self(op).kind;
  return kind.api.Guard(kind.operator_name,
                        [&] { Self(op).entry.infer_shapes(kind.api, context); });
}

Registration::Registration(const Runtime& runtime, const Operator& entry_, DType dtype,
                           Device device)
    : CustomOp{}, entry(entry_), kind{ort::Api(runtime.table), entry.name, dtype, device} {
  version = ort::kApiVersion;
  GetName = [](const CustomOp* op) { return Self(op).entry.name; };
  GetExecutionProviderType = [](const CustomOp* op) {
    return Self(op).on_cuda() ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  GetInputType = [](const CustomOp* op, size_t i) {
    return Self(op).entry.inputs[i].TypeIn(Self(op).kind.dtype);
  };
  GetInputTypeCount = [](const CustomOp* op) { return Self(op).entry.inputs.size(); };
  GetOutputType = [](const CustomOp* op, size_t i) {
    return Self(op).entry.outputs[i].TypeIn(Self(op).kind.dtype);
  };
  GetOutputTypeCount = [](const CustomOp* op) { return Self(op).entry.outputs.size(); };
  GetInputCharacteristic = [](const CustomOp* op, size_t i) {
    return CharacteristicOf(Self(op).entry.inputs[i]);
  };
  GetOutputCharacteristic = [](const CustomOp* op, size_t i) {
    return CharacteristicOf(Self(op).entry.outputs[i]);
  };
  GetInputMemoryType = InputMemory;
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = RunKernel;
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  InferOutputShapeFn = runtime.infers_shapes && entry.infer_shapes ? InferShapes : nullptr;
  GetStartVersion = [](const CustomOp*) { return 1; };
  GetEndVersion = [](const CustomOp*) { return 1; };
  GetMayInplace = entry.may_inplace;
  ReleaseMayInplace = [](int*, int*) {};
}

OrtCustomOpDomain* MakeDomain(const Runtime& runtime) {
  const ort::Api api(runtime.table);
  const bool has_cuda = HasCudaLibrary();
  OrtCustomOpDomain* domain = nullptr;
  api.Check(api.CreateCustomOpDomain(kDomain, &domain));
  for (const Operator& entry : Operators())
    for (Device device : {Device::kCpu, Device::kCuda})
      for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        if (device == Device::kCpu || (has_cuda && entry.has_cuda))
          api.Check(
              api.CustomOpDomain_Add(domain, new Registration(runtime, entry, dtype, device)));
  return domain;
}

// What one ONNX Runtime of the process was given. Never freed: sessions keep the pointers, and
// nothing tells when the last one is gone.
OrtCustomOpDomain* DomainOf(const Runtime& runtime) {
  static std::mutex mutex;
  static auto* domains = new std::map<const OrtApi*, OrtCustomOpDomain*>();
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& domain = (*domains)[runtime.table];
  if (domain == nullptr) domain = MakeDomain(runtime);
  return domain;
}

OrtStatus* RefuseOldRuntime(const OrtApiBase* base) {
  const std::string message =
      std::string("the trianglemix operators need ONNX Runtime 1.20 or later, this is ") +
      base->GetVersionString() + "; install a newer one";
  const ort::Api first(base->GetApi(1));
  return first.CreateStatus(ort::ErrorCode::kNotImplemented, message.c_str());
}

}  // namespace
}  // namespace trianglemix

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace trianglemix;
  const OrtApi* table = base->GetApi(ort::kApiVersion);
  if (table == nullptr) return RefuseOldRuntime(base);
  const ort::Api api(table);
  const Runtime runtime{table, InfersShapes(base->GetVersionString())};
  return api.Guard(kDomain, [&] { api.Check(api.AddCustomOpDomain(options, DomainOf(runtime))); });
}

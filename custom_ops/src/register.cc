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
using ort::ElementType;
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

struct Registration : CustomOp {
  Registration(const Runtime& runtime, const Operator& entry, DType dtype, Device device);

  ElementType TypeOf(const Port& port) const {
    return port.type == kKernelType ? ElementTypeOf(dtype) : port.type;
  }

  ort::Api api;
  const Operator& entry;
  DType dtype;
  Device device;
};

const Registration& Self(const CustomOp* op) { return *static_cast<const Registration*>(op); }

const char* Provider(const CustomOp* op) {
  return Self(op).device == Device::kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
}

Characteristic CharacteristicOf(const Port& port) {
  return port.required ? Characteristic::kRequired : Characteristic::kOptional;
}

// CUDA graphs freeze inputs that the host reads.
MemoryType InputMemory(const CustomOp* op, size_t index) {
  const bool host = Self(op).device == Device::kCuda && Self(op).entry.inputs[index].on_host;
  return host ? MemoryType::kCpuInput : MemoryType::kDefault;
}

// What a session holds of a node.
struct Instance {
  const Registration& op;
  std::unique_ptr<Kernel> kernel;
};

OrtStatus* MakeInstance(const CustomOp* op, const OrtApi* table, const OrtKernelInfo* info,
                        void** instance) {
  const Registration& self = Self(op);
  const Node node{ort::Api(table), info, self.dtype, self.device};
  return node.api.Guard(self.entry.name,
                        [&] { *instance = new Instance{self, self.entry.make_kernel(node)}; });
}

OrtStatus* RunInstance(void* instance, OrtKernelContext* context) {
  const auto* self = static_cast<const Instance*>(instance);
  return self->op.api.Guard(self->op.entry.name, [&] { self->kernel->Compute(context); });
}

OrtStatus* InferShapes(const CustomOp* op, OrtShapeInferContext* context) {
  const Registration& self = Self(op);
  return self.api.Guard(self.entry.name, [&] { self.entry.infer_shapes(self.api, context); });
}

Registration::Registration(const Runtime& runtime, const Operator& entry_, DType dtype_,
                           Device device_)
    : CustomOp{}, api(runtime.table), entry(entry_), dtype(dtype_), device(device_) {
  version = ort::kApiVersion;
  GetName = [](const CustomOp* op) { return Self(op).entry.name; };
  GetExecutionProviderType = Provider;
  GetInputType = [](const CustomOp* op, size_t i) {
    return Self(op).TypeOf(Self(op).entry.inputs[i]);
  };
  GetInputTypeCount = [](const CustomOp* op) { return Self(op).entry.inputs.size(); };
  GetOutputType = [](const CustomOp* op, size_t i) {
    return Self(op).TypeOf(Self(op).entry.outputs[i]);
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
  CreateKernelV2 = MakeInstance;
  KernelComputeV2 = RunInstance;
  KernelDestroy = [](void* instance) { delete static_cast<Instance*>(instance); };
  InferOutputShapeFn = runtime.infers_shapes && entry.infer_shapes ? InferShapes : nullptr;
  GetStartVersion = [](const CustomOp*) { return 1; };
  GetEndVersion = [](const CustomOp*) { return 1; };
  GetMayInplace = entry.may_inplace;
  ReleaseMayInplace = [](int*, int*) {};
}

// What one ONNX Runtime of the process was given.
class Domain {
 public:
  explicit Domain(const Runtime& runtime) {
    const ort::Api api(runtime.table);
    const bool has_cuda = HasCudaLibrary();
    for (const Operator& entry : Operators())
      for (Device device : {Device::kCpu, Device::kCuda})
        for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
          if (device == Device::kCpu || (has_cuda && entry.has_cuda))
            registrations_.emplace_back(runtime, entry, dtype, device);
    api.Check(api.CreateCustomOpDomain(kDomain, &domain_));
    for (const Registration& op : registrations_) api.Check(api.CustomOpDomain_Add(domain_, &op));
  }
  OrtCustomOpDomain* get() const { return domain_; }

 private:
  std::vector<Registration> registrations_;
  OrtCustomOpDomain* domain_ = nullptr;
};

// Never freed: sessions keep the pointers, and nothing tells when the last one is gone.
OrtCustomOpDomain* DomainOf(const Runtime& runtime) {
  static std::mutex mutex;
  static auto* domains = new std::map<const OrtApi*, const Domain*>();
  const std::lock_guard<std::mutex> lock(mutex);
  const Domain*& domain = (*domains)[runtime.table];
  if (domain == nullptr) domain = new Domain(runtime);
  return domain->get();
}

OrtStatus* RefuseOldRuntime(const OrtApiBase* base) {
  std::string message;
  for (const Operator& entry : Operators())
    message += std::string(message.empty() ? "" : ", ") + entry.name;
  message += std::string(" needs ONNX Runtime 1.20 or later, this is ") + base->GetVersionString() +
             "; install a newer one";
  const ort::Api first(base->GetApi(1));
  return first.CreateStatus(static_cast<int>(ort::ErrorCode::kNotImplemented), message.c_str());
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

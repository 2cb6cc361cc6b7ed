// Registers the operator with ONNX Runtime: one OrtCustomOp for each data type and device.
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_loader.h"
#include "op.h"
#include "ort_abi.h"

namespace trianglemix {
namespace {

using ort::Characteristic;
using ort::CustomOp;
using ort::ElementType;
using ort::MemoryType;

constexpr const char* kDomain = "trianglemix";
constexpr const char* kOpType = "TriangleAttention";

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
  Registration(const Runtime& runtime, DType dtype, Device device);

  ElementType element_type() const {
    if (dtype == DType::kFloat32) return ElementType::kFloat32;
    return dtype == DType::kFloat16 ? ElementType::kFloat16 : ElementType::kBFloat16;
  }

  ort::Api api;
  DType dtype;
  Device device;
};

const Registration& Self(const CustomOp* op) { return *static_cast<const Registration*>(op); }

const char* Provider(const CustomOp* op) {
  return Self(op).device == Device::kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
}

ElementType InputType(const CustomOp* op, size_t index) {
  const bool is_length = index >= kSeqlensK && index <= kFirstValid;
  return is_length ? ElementType::kInt32 : Self(op).element_type();
}

Characteristic InputCharacteristic(const CustomOp*, size_t index) {
  const bool required = index == kQuery || index == kSeqlensK || index == kTotalSequenceLength;
  return required ? Characteristic::kRequired : Characteristic::kOptional;
}

// The lengths stay on the device: CUDA graphs freeze inputs that the host reads.
MemoryType InputMemory(const CustomOp* op, size_t index) {
  const bool host = Self(op).device == Device::kCuda && index == kTotalSequenceLength;
  return host ? MemoryType::kCpuInput : MemoryType::kDefault;
}

OrtStatus* MakeKernel(const CustomOp* op, const OrtApi* table, const OrtKernelInfo* info,
                      void** kernel) {
  const ort::Api api(table);
  return api.Guard([&] { *kernel = new OpKernel(api, info, Self(op).dtype, Self(op).device); });
}

OrtStatus* RunKernel(void* kernel, OrtKernelContext* context) {
  const auto* self = static_cast<const OpKernel*>(kernel);
  return self->api().Guard([&] { self->Compute(context); });
}

OrtStatus* InferShapes(const CustomOp* op, OrtShapeInferContext* context) {
  const ort::Api& api = Self(op).api;
  return api.Guard([&] { InferOutputShapes(api, context); });
}

// The cache may be updated in place: past_key to present_key, past_value to present_value.
size_t MayInplace(int** inputs, int** outputs) {
  static int from[] = {kPastKey, kPastValue};
  static int to[] = {kPresentKey, kPresentValue};
  *inputs = from;
  *outputs = to;
  return 2;
}

Registration::Registration(const Runtime& runtime, DType dtype_, Device device_)
    : CustomOp{}, api(runtime.table), dtype(dtype_), device(device_) {
  version = ort::kApiVersion;
  GetName = [](const CustomOp*) { return kOpType; };
  GetExecutionProviderType = Provider;
  GetInputType = InputType;
  GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputCount; };
  GetOutputType = [](const CustomOp* op, size_t) { return Self(op).element_type(); };
  GetOutputTypeCount = [](const CustomOp*) -> size_t { return kOutputCount; };
  GetInputCharacteristic = InputCharacteristic;
  GetOutputCharacteristic = [](const CustomOp*, size_t) { return Characteristic::kRequired; };
  GetInputMemoryType = InputMemory;
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = RunKernel;
  KernelDestroy = [](void* kernel) { delete static_cast<OpKernel*>(kernel); };
  InferOutputShapeFn = runtime.infers_shapes ? InferShapes : nullptr;
  GetStartVersion = [](const CustomOp*) { return 1; };
  GetEndVersion = [](const CustomOp*) { return 1; };
  GetMayInplace = MayInplace;
  ReleaseMayInplace = [](int*, int*) {};
}

// What one ONNX Runtime of the process was given.
class Domain {
 public:
  explicit Domain(const Runtime& runtime) {
    const ort::Api api(runtime.table);
    std::vector<Device> devices = {Device::kCpu};
    if (HasCudaLibrary()) devices.push_back(Device::kCuda);
    for (Device device : devices)
      for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        registrations_.emplace_back(runtime, dtype, device);
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
  const std::string message = std::string(
                                  "TriangleAttention needs ONNX Runtime 1.20 or later, "
                                  "this is ") +
                              base->GetVersionString() + "; install a newer one";
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
  return api.Guard([&] { api.Check(api.AddCustomOpDomain(options, DomainOf(runtime))); });
}

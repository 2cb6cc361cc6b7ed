// Where a call's results go and what runs it: output tensors, session threads, device and stream.
#pragma once

#include "../cpu/kernel.h"
#include "cuda_loader.h"
#include "inputs.h"

namespace trianglemix {

// Has output `index`, named `name`, made with that shape.
Tensor MakeOutput(const ort::Api& api, OrtKernelContext* context, size_t index, const char* name,
                  const Shape& shape);

// The same of one that need not be connected: then an empty Tensor.
Tensor MakeOptionalOutput(const ort::Api& api, OrtKernelContext* context, size_t index,
                          const char* name, const Shape& shape);

// Makes the outputs that all operators with a cache have, and points the problem to them.
void SetOutputs(const ort::Api& api, OrtKernelContext* context, const Inputs& inputs,
                AttentionProblem* problem);

// The session's threads.
class SessionThreads final : public cpu::ParallelFor {
 public:
  SessionThreads(const ort::Api& api, const OrtKernelContext* context)
      : api_(api), context_(context) {}

  const char* Run(size_t count, Body body, void* argument) override {
    // As many batches as indices: idle threads take the next one.
    OrtStatus* status = api_.KernelContext_ParallelFor(context_, body, count, count, argument);
    return api_.Succeeded(status) ? nullptr : "ONNX Runtime's thread pool refused the work";
  }

 private:
  const ort::Api& api_;
  const OrtKernelContext* context_;
};

// Runs the call on the stream and device of `query`, an input of it. Throws ort::Error.
void RunOnCuda(const ort::Api& api, const OrtKernelContext* context, const CudaKernels& kernels,
               const AttentionProblem& problem, const OrtValue* query);

}  // namespace trianglemix

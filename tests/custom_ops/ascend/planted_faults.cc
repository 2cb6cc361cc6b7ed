// Small kernels with one fault each, and the same without it: what the shim must catch and pass.
#include "launch.h"

using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::TPosition;
using AscendC::TQue;

namespace {

constexpr int64_t kFloats = 1024;  // of each global array, and of a buffer

// Arrays that a kernel reads and writes.
float* given;
float* made;

struct Arrays {
  Arrays() {
    input.SetGlobalBuffer(given);
    output.SetGlobalBuffer(made);
  }
  GlobalTensor<float> input, output;
};

bool IsVector(int index) { return shim::Current().index == index; }

// Doubles `count` floats from `source` on, through queues of `buffer` floats.
void Double(uint32_t count, uint32_t source = 0, uint32_t place = 0, uint32_t buffer = kFloats) {
  Arrays arrays;
  AscendC::TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  pipe.InitBuffer(in, 1, buffer * sizeof(float));
  pipe.InitBuffer(out, 1, buffer * sizeof(float));
  LocalTensor<float> x = in.AllocTensor<float>();
  AscendC::DataCopy(x[place], arrays.input[source], count);
  in.EnQue(x);
  LocalTensor<float> y = in.DeQue<float>();
  LocalTensor<float> z = out.AllocTensor<float>();
  AscendC::Muls(z, y[place], 2.0f, static_cast<int32_t>(count));
  out.EnQue(z);
  LocalTensor<float> w = out.DeQue<float>();
  AscendC::DataCopy(arrays.output[source], w, count);
  in.FreeTensor(y);
  out.FreeTensor(w);
}

// The same with plain buffers, and with every wait that a bit of `leave` does not take away.
void DoubleByHand(int leave) {
  Arrays arrays;
  AscendC::TPipe pipe;
  AscendC::TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, kFloats * sizeof(float));
  LocalTensor<float> x = buffer.Get<float>();
  AscendC::DataCopy(x, arrays.input, kFloats);
  if (!(leave & 16)) AscendC::SetFlag<HardEvent::MTE2_V>(0);
  if (!(leave & 1)) AscendC::WaitFlag<HardEvent::MTE2_V>(0);
  AscendC::Muls(x, x, 4.0f, kFloats);
  if (!(leave & 2)) AscendC::PipeBarrier<PIPE_V>();
  AscendC::Muls(x, x, 0.5f, kFloats);
  AscendC::SetFlag<HardEvent::V_MTE3>(0);
  if (!(leave & 4)) AscendC::WaitFlag<HardEvent::V_MTE3>(0);
  if (leave & 8) AscendC::SetFlag<HardEvent::V_MTE3>(1);
  AscendC::DataCopy(arrays.output, x, kFloats);
}

// Vector core 1 writes, the cube core says so, vector core 2 reads.
void Relay(bool set, bool wait) {
  Arrays arrays;
  AscendC::TPipe pipe;
  if (shim::Current().index == 0) {
    AscendC::CrossCoreWaitFlag(0);
    if (set) AscendC::CrossCoreSetFlag<2, PIPE_FIX>(1);
    return;
  }
  AscendC::TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 64 * sizeof(float));
  LocalTensor<float> x = buffer.Get<float>();
  if (IsVector(1)) {
    AscendC::Duplicate(x, 1.0f, 64);
    AscendC::PipeBarrier<PIPE_ALL>();
    AscendC::DataCopy(arrays.output, x, 64);
  }
  AscendC::CrossCoreSetFlag<2, PIPE_MTE3>(0);
  if (wait || IsVector(1)) AscendC::CrossCoreWaitFlag(1);
  if (IsVector(2)) AscendC::DataCopy(x, arrays.output, 64);
  if (!wait && IsVector(2)) AscendC::CrossCoreWaitFlag(1);
}

void Product(uint16_t rows, uint32_t offset, bool barrier) {
  AscendC::TPipe pipe;
  AscendC::TBuf<TPosition::A1> one;
  AscendC::TBuf<TPosition::A2> left;
  AscendC::TBuf<TPosition::B2> right;
  AscendC::TBuf<TPosition::CO1> sums;
  pipe.InitBuffer(one, 2048);
  pipe.InitBuffer(left, 1024);
  pipe.InitBuffer(right, 1024);
  pipe.InitBuffer(sums, 1024);
  LocalTensor<half> source = one.Get<half>();
  AscendC::InitConstValueParams<half> fill;
  fill.repeatTimes = 1;
  fill.blockNum = 64;
  fill.initValue = half(1.0f);
  AscendC::InitConstValue(source, fill);
  AscendC::PipeBarrier<PIPE_ALL>();
  AscendC::LoadData2DParams load;
  load.repeatTimes = 1;
  AscendC::LoadData(left.Get<half>()[offset], source, load);
  AscendC::LoadData(right.Get<half>(), source, load);
  AscendC::PipeBarrier<PIPE_ALL>();
  AscendC::MmadParams sizes;
  sizes.m = rows;
  sizes.n = 16;
  sizes.k = 16;
  AscendC::Mmad(sums.Get<float>(), left.Get<half>(), right.Get<half>(), sizes);
  if (barrier) AscendC::PipeBarrier<PIPE_M>();
  sizes.cmatrixInitVal = false;
  AscendC::Mmad(sums.Get<float>(), left.Get<half>(), right.Get<half>(), sizes);
}

template <typename Body>
void OnVector(Body body) {
  if (IsVector(1)) body();
}

template <typename Body>
void OnCube(Body body) {
  if (shim::Current().index == 0) body();
}

void TakeTwo() {
  AscendC::TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  pipe.InitBuffer(in, 1, 64);
  in.AllocTensor<float>();
  in.AllocTensor<float>();
}

void TakeUnqueued() {
  AscendC::TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  pipe.InitBuffer(in, 1, 64);
  in.DeQue<float>();
}

void KeepTensor() {
  AscendC::TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  pipe.InitBuffer(in, 1, 64);
  in.AllocTensor<float>();
}

void ReadUnwritten() {
  AscendC::TPipe pipe;
  AscendC::TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 256);
  AscendC::Adds(buffer.Get<float>(), buffer.Get<float>(), 1.0f, 64);
}

template <TPosition position>
void TakeBytes(uint32_t bytes) {
  AscendC::TPipe pipe;
  AscendC::TBuf<position> buffer;
  pipe.InitBuffer(buffer, bytes);
}

void SetOften() {
  for (int i = 0; i < 16; ++i) AscendC::CrossCoreSetFlag<2, PIPE_FIX>(3);
}

const std::map<std::string, shim::Body> kKernels = {
    {"fine", [] { OnVector([] { Double(kFloats); }); }},
    {"fine by hand", [] { OnVector([] { DoubleByHand(0); }); }},
    {"fine relay", [] { Relay(true, true); }},
    {"fine product", [] { OnCube([] { Product(16, 0, true); }); }},
    {"buffer overflow", [] { OnVector([] { Double(512, 0, 0, 256); }); }},
    {"global overflow", [] { OnVector([] { Double(512, 768); }); }},
    {"misaligned place", [] { OnVector([] { Double(512, 0, 4); }); }},
    {"misaligned count", [] { OnVector([] { Double(500); }); }},
    {"misaligned fractal", [] { OnCube([] { Product(16, 16, true); }); }},
    {"no wait for a copy", [] { OnVector([] { DoubleByHand(1); }); }},
    {"no barrier", [] { OnVector([] { DoubleByHand(2); }); }},
    {"no wait for a result", [] { OnVector([] { DoubleByHand(4); }); }},
    {"set without wait", [] { OnVector([] { DoubleByHand(8); }); }},
    {"wait without set", [] { OnVector([] { DoubleByHand(16); }); }},
    {"no cross-core wait", [] { Relay(true, false); }},
    {"no cross-core set", [] { Relay(false, true); }},
    {"set too often", [] { OnCube(SetOften); }},
    {"cross-core set without wait",
     [] { OnCube([] { AscendC::CrossCoreSetFlag<2, PIPE_FIX>(3); }); }},
    {"two of one buffer", [] { OnVector(TakeTwo); }},
    {"dequeued before queued", [] { OnVector(TakeUnqueued); }},
    {"never freed", [] { OnVector(KeepTensor); }},
    {"unwritten", [] { OnVector(ReadUnwritten); }},
    {"unified buffer full",
     [] { OnVector([] { TakeBytes<TPosition::VECCALC>(192 * 1024 + 32); }); }},
    {"L1 full", [] { OnCube([] { TakeBytes<TPosition::A1>(512 * 1024 + 32); }); }},
    {"L0C full", [] { OnCube([] { TakeBytes<TPosition::CO1>(128 * 1024 + 32); }); }},
    {"vector memory on the cube core", [] { OnCube([] { TakeBytes<TPosition::VECCALC>(32); }); }},
    {"one row of a product", [] { OnCube([] { Product(1, 0, true); }); }},
    {"products without a barrier", [] { OnCube([] { Product(16, 0, false); }); }},
    {"two blocks at one place", [] { OnVector([] { Double(kFloats); }); }},
};

}  // namespace

// What the shim says of a kernel; empty where it finds nothing.
extern "C" const char* ascend_fault(const char* name) {
  static std::string said;
  shim::Machine machine;
  machine.blocks = std::string(name) == "two blocks at one place" ? 2 : 1;
  for (const char* array : {"input", "output"})
    machine.global.push_back(std::make_unique<shim::Memory>(array, kFloats * sizeof(float)));
  for (shim::Granule& granule : machine.global[0]->granules) granule.written = true;
  given = reinterpret_cast<float*>(machine.global[0]->bytes.data());
  made = reinterpret_cast<float*>(machine.global[1]->bytes.data());
  std::fill(given, given + kFloats, 3.0f);
  said.clear();
  try {
    shim::Launch(machine, kKernels.at(name));
  } catch (const std::exception& fault) {
    said = fault.what();
  }
  return said.c_str();
}

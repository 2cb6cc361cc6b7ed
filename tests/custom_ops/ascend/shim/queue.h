// TPipe, TQue, TQueBind, TBuf, events and flags: who owns a buffer, and who waits for whom.
#pragma once

#include <exception>
#include <list>

#include "tensor.h"

namespace AscendC {

struct QueuePipes {
  int producer;
  int consumer;
};

constexpr QueuePipes PipesOf(TPosition from, TPosition to) {
  switch (from) {
    case TPosition::VECIN:
      return to == TPosition::VECOUT ? QueuePipes{PIPE_MTE2, PIPE_MTE3}
                                     : QueuePipes{PIPE_MTE2, PIPE_V};
    case TPosition::VECOUT:
      return {PIPE_V, PIPE_MTE3};
    case TPosition::A1:
    case TPosition::B1:
      return {PIPE_MTE2, PIPE_MTE1};
    case TPosition::A2:
    case TPosition::B2:
      return {PIPE_MTE1, PIPE_M};
    default:
      return {PIPE_M, PIPE_FIX};
  }
}

template <TPosition from, TPosition to, int32_t depth>
class TQueBind {
 public:
  ~TQueBind() {
    for (const Buffer& buffer : buffers_)
      if (buffer.state != State::kFree && std::uncaught_exceptions() == 0)
        shim::Current().late = shim::Current().name + ": a tensor of a queue is never freed";
  }

  template <typename T>
  LocalTensor<T> AllocTensor() {
    for (Buffer& buffer : buffers_) {
      if (buffer.state != State::kFree) continue;
      buffer.state = State::kAllocated;
      shim::Join(shim::Current().known[kPipes.producer], buffer.clock);
      return LocalTensor<T>(memory_, shim::KindOf(from), buffer.begin, buffer.end);
    }
    throw shim::Fault(shim::Current().name + ": AllocTensor, but all " +
                      std::to_string(buffers_.size()) + " buffers of the queue are in use");
  }

  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor) {
    Buffer& buffer = Find(tensor.begin(), "EnQue");
    SHIM_CHECK(buffer.state == State::kAllocated, "EnQue of a tensor that is not allocated");
    SHIM_CHECK(static_cast<int32_t>(queued_.size()) < depth, "EnQue beyond the queue's depth");
    buffer.state = State::kQueued;
    buffer.clock = shim::Snapshot(shim::Current(), kPipes.producer);
    queued_.push_back(&buffer);
    return true;
  }

  template <typename T>
  LocalTensor<T> DeQue() {
    SHIM_CHECK(!queued_.empty(), shim::Current().name + ": DeQue without EnQue");
    Buffer& buffer = *queued_.front();
    queued_.pop_front();
    buffer.state = State::kTaken;
    shim::Join(shim::Current().known[kPipes.consumer], buffer.clock);
    return LocalTensor<T>(memory_, shim::KindOf(from), buffer.begin, buffer.end);
  }

  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor) {
    Buffer& buffer = Find(tensor.begin(), "FreeTensor");
    SHIM_CHECK(buffer.state == State::kTaken, "FreeTensor of a tensor that was not dequeued");
    buffer.state = State::kFree;
    buffer.clock = shim::Snapshot(shim::Current(), kPipes.consumer);
    buffers_.splice(buffers_.end(), buffers_, buffers_.begin());  // the other buffer is next
  }

 private:
  friend class TPipe;
  enum class State { kFree, kAllocated, kQueued, kTaken };
  struct Buffer {
    int64_t begin;
    int64_t end;
    State state = State::kFree;
    shim::Clock clock{};
  };
  static constexpr QueuePipes kPipes = PipesOf(from, to);

  Buffer& Find(int64_t begin, const char* what) {
    for (Buffer& buffer : buffers_)
      if (buffer.begin == begin) return buffer;
    throw shim::Fault(std::string(what) + " of a tensor that is not this queue's");
  }

  shim::Memory* memory_ = nullptr;
  std::list<Buffer> buffers_;
  std::deque<Buffer*> queued_;
};

template <TPosition position, int32_t depth>
class TQue : public TQueBind<position, position, depth> {};

template <TPosition position>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() const {
    return LocalTensor<T>(memory_, shim::KindOf(position), begin_, end_);
  }

 private:
  friend class TPipe;
  shim::Memory* memory_ = nullptr;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

class TPipe {
 public:
  template <TPosition from, TPosition to, int32_t depth>
  bool InitBuffer(TQueBind<from, to, depth>& queue, uint8_t number, uint32_t size) {
    queue.memory_ = &shim::Current().Local(shim::KindOf(from));
    const QueuePipes pipes = PipesOf(from, to);
    int& events = shim::Current().queueBuffers[pipes.producer * shim::kPipes + pipes.consumer];
    for (uint8_t i = 0; i < number; ++i) {
      SHIM_CHECK(++events <= 8, "more than 8 queue buffers between two pipes: no event is left");
      const int64_t begin = Take(*queue.memory_, size);
      queue.buffers_.push_back({begin, begin + size});
    }
    return true;
  }

  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t size) {
    buffer.memory_ = &shim::Current().Local(shim::KindOf(position));
    buffer.begin_ = Take(*buffer.memory_, size);
    buffer.end_ = buffer.begin_ + size;
    return true;
  }

 private:
  static int64_t Take(shim::Memory& memory, int64_t size) {
    shim::Core& core = shim::Current();
    const int64_t begin = memory.taken;
    memory.taken += (size + shim::kGranule - 1) / shim::kGranule * shim::kGranule;
    SHIM_CHECK(memory.taken <= static_cast<int64_t>(memory.bytes.size()),
               core.name + ": InitBuffer takes " + std::to_string(memory.taken) + " bytes of " +
                   memory.name + ", which has " + std::to_string(memory.bytes.size()));
    SHIM_CHECK(++core.buffers <= 64, "more than 64 buffers");
    return begin;
  }
};

// ------------------------------------------------------------------------------ synchronisation

enum class HardEvent : uint8_t { MTE2_V, V_MTE2, V_MTE3, MTE3_V };

constexpr QueuePipes PipesOf(HardEvent event) {
  switch (event) {
    case HardEvent::MTE2_V:
      return {PIPE_MTE2, PIPE_V};
    case HardEvent::V_MTE2:
      return {PIPE_V, PIPE_MTE2};
    case HardEvent::V_MTE3:
      return {PIPE_V, PIPE_MTE3};
    default:
      return {PIPE_MTE3, PIPE_V};
  }
}

template <HardEvent event>
void SetFlag(int32_t id) {
  shim::Core& core = shim::Current();
  const int key = static_cast<int>(event) * 8 + id;
  SHIM_CHECK(core.events.count(key) == 0, core.name + ": SetFlag of a flag that is set");
  core.events[key] = shim::Snapshot(core, PipesOf(event).producer);
}

template <HardEvent event>
void WaitFlag(int32_t id) {
  shim::Core& core = shim::Current();
  const int key = static_cast<int>(event) * 8 + id;
  SHIM_CHECK(core.events.count(key) == 1, core.name + ": WaitFlag without SetFlag");
  shim::Join(core.known[PipesOf(event).consumer], core.events[key]);
  core.events.erase(key);
}

template <pipe_t pipe>
void PipeBarrier() {
  SHIM_CHECK(pipe != PIPE_S, "PipeBarrier<PIPE_S> is an error on the device");
  shim::Barrier(pipe);
}

template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(uint16_t flag) {
  shim::SetCrossFlag(mode, pipe, flag);
}

inline void CrossCoreWaitFlag(uint16_t flag) { shim::AwaitCrossFlag(flag); }

inline int64_t GetBlockNum() { return shim::TheMachine()->blocks; }
inline int64_t GetSubBlockNum() { return shim::Current().index == 0 ? 1 : 2; }
inline int64_t GetSubBlockIdx() { return std::max(0, shim::Current().index - 1); }
inline int64_t GetBlockIdx() { return shim::Current().block * GetSubBlockNum() + GetSubBlockIdx(); }
inline GM_ADDR GetUserWorkspace(GM_ADDR workspace) { return workspace; }

}  // namespace AscendC

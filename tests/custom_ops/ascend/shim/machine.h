// The cores of an AI core group on a CPU: memories, pipes and signals, and what is checked of each
// access.
//
// Instructions run at once, in program order, but every pipe keeps a vector clock of what it knows
// to be complete. An access that conflicts with an earlier one which its pipe does not know to be
// complete is a fault: on the device the two could run in either order.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

namespace shim {

constexpr int kPipes = 7;
constexpr int kGroupCores = 3;  // one cube core, two vector cores
constexpr int kClocks = kPipes * kGroupCores;
constexpr int64_t kGranule = 32;
constexpr int kFlags = 11;
constexpr int kMostSets = 15;

inline const char* PipeName(int pipe) {
  static const char* names[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX", "ALL"};
  return names[pipe];
}

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A macro, so that the text is made only where it is needed.
#define SHIM_CHECK(FINE, WHAT)            \
  do {                                    \
    if (!(FINE)) throw shim::Fault(WHAT); \
  } while (false)

using Clock = std::array<uint32_t, kClocks>;

inline void Join(Clock& into, const Clock& from) {
  for (int i = 0; i < kClocks; ++i) into[i] = std::max(into[i], from[i]);
}

// What happened to 32 bytes. Blocks do not synchronise, so another block's access is never ordered.
struct Granule {
  bool written = false;
  int writeBlock = -1;
  int writeClock = 0;
  uint32_t writeEpoch = 0;
  int readBlock = -1;
  std::array<uint32_t, kClocks> readEpoch{};
  uint32_t readBefore = 0;  // by the pipe that reads it now, in an earlier instruction
};

// Local memory of a core, or one array in global memory.
struct Memory {
  Memory(std::string what, int64_t size)
      : name(std::move(what)), bytes(size, 0xFF), granules((size + kGranule - 1) / kGranule) {}
  std::string name;
  std::vector<uint8_t> bytes;  // 0xFF: NaN in every type
  std::vector<Granule> granules;
  int64_t taken = 0;  // by buffers
};

enum Kind { kUnified, kL1, kL0A, kL0B, kL0C, kKinds };

struct Core {
  std::string name;
  int block = 0;
  int index = 0;  // 0 = cube, 1 and 2 = vector
  std::array<Clock, kPipes> known{};
  std::array<uint32_t, kPipes> issued{};
  std::array<std::unique_ptr<Memory>, kKinds> memories;
  std::array<std::deque<Clock>, kFlags> flags;   // signals to this core from the other kind
  std::array<std::deque<Clock>, kFlags> second;  // to the cube core: those of vector core 2
  std::map<int, Clock> events;
  int buffers = 0;
  std::map<int, int> queueBuffers;  // by pair of pipes: each takes an event
  std::string late;                 // found where nothing can be thrown
  ucontext_t context{};
  std::vector<char> stack;
  bool done = false;
  bool waiting = false;
  std::string fault;

  int ClockOf(int pipe) const { return index * kPipes + pipe; }
  Memory& Local(Kind kind) {
    SHIM_CHECK(memories[kind] != nullptr, name + " has no such memory");
    return *memories[kind];
  }
};

struct Machine {
  ucontext_t scheduler{};
  Core* current = nullptr;
  std::array<Core*, kGroupCores> group{};
  int blocks = 1;
  std::vector<std::unique_ptr<Memory>> global;
  std::array<int64_t, kKinds> peak{};
};

inline Machine*& TheMachine() {
  static Machine* machine = nullptr;
  return machine;
}
inline Core& Current() { return *TheMachine()->current; }

// ---------------------------------------------------------------------------------- accesses

// One instruction on a pipe of the current core: an epoch, and the accesses checked against it.
class Instruction {
 public:
  Instruction(const char* name, int pipe) : core_(Current()), name_(name), pipe_(pipe) {
    Join(core_.known[pipe],
         core_.known[PIPE_S]);  // it is issued after what the scalar unit awaited
    epoch_ = ++core_.issued[pipe];
  }

  void Read(Memory& memory, int64_t at, int64_t size, bool mustBeWritten = true) {
    ForGranules(memory, at, size, [&](Granule& granule, int64_t where) {
      SHIM_CHECK(granule.written || !mustBeWritten,
                 Says(memory, where) + " reads what nobody has written");
      CheckOrder(granule, memory, where, "written");
      Note(granule);
    });
  }

  void Write(Memory& memory, int64_t at, int64_t size) {
    ForGranules(memory, at, size, [&](Granule& granule, int64_t where) {
      CheckOrder(granule, memory, where, "written");
      CheckReads(granule, memory, where);
      granule.written = true;
      granule.writeBlock = core_.block;
      granule.writeClock = core_.ClockOf(pipe_);
      granule.writeEpoch = epoch_;
    });
  }

  // Later instructions of the same pipe are known to see this one's results.
  void Settle() { core_.known[pipe_][core_.ClockOf(pipe_)] = epoch_; }

  std::string Says(const Memory& memory, int64_t at) const {
    return core_.name + ": " + name_ + " (pipe " + PipeName(pipe_) + ") at byte " +
           std::to_string(at) + " of " + memory.name;
  }

 private:
  template <typename Body>
  void ForGranules(Memory& memory, int64_t at, int64_t size, Body body) {
    const int64_t held = static_cast<int64_t>(memory.bytes.size());
    SHIM_CHECK(at >= 0 && size >= 0 && at + size <= held,
               Says(memory, at) + " is out of bounds: " + std::to_string(size) + " bytes, of " +
                   std::to_string(held) + " there are");
    for (int64_t g = at / kGranule; g * kGranule < at + size; ++g)
      body(memory.granules[g], g * kGranule);
  }

  bool Ordered(int clock, uint32_t epoch) const {
    const bool self = clock == core_.ClockOf(pipe_) && epoch == epoch_;
    return self || core_.known[pipe_][clock] >= epoch;
  }

  void CheckOrder(const Granule& granule, const Memory& memory, int64_t at, const char* how) {
    if (granule.writeBlock < 0) return;
    SHIM_CHECK(granule.writeBlock == core_.block && Ordered(granule.writeClock, granule.writeEpoch),
               Says(memory, at) + " does not wait for what was " + how + " there by pipe " +
                   PipeName(granule.writeClock % kPipes));
  }

  void CheckReads(const Granule& granule, const Memory& memory, int64_t at) {
    if (granule.readBlock == -1) return;
    SHIM_CHECK(granule.readBlock == core_.block,
               Says(memory, at) + " writes what another block reads");
    const int self = core_.ClockOf(pipe_);
    for (int clock = 0; clock < kClocks; ++clock) {
      const uint32_t epoch = granule.readEpoch[clock];
      const bool own = clock == self && epoch == epoch_;
      SHIM_CHECK(
          Ordered(clock, own ? granule.readBefore : epoch),
          Says(memory, at) + " does not wait for a reader, pipe " + PipeName(clock % kPipes));
    }
  }

  void Note(Granule& granule) {
    granule.readBlock =
        granule.readBlock == -1 || granule.readBlock == core_.block ? core_.block : -2;
    uint32_t& last = granule.readEpoch[core_.ClockOf(pipe_)];
    if (last != epoch_) granule.readBefore = last;
    last = epoch_;
  }

  Core& core_;
  const char* name_;
  int pipe_;
  uint32_t epoch_;
};

// ----------------------------------------------------------------------------------- signals

// All that a pipe has been given, and what it knows: complete when a signal on that pipe arrives.
inline Clock Snapshot(const Core& core, int pipe) {
  Clock clock = core.known[pipe];
  Join(clock, core.known[PIPE_S]);
  clock[core.ClockOf(pipe)] = core.issued[pipe];
  return clock;
}

inline void Barrier(int pipe) {
  Core& core = Current();
  if (pipe != PIPE_ALL) {
    core.known[pipe][core.ClockOf(pipe)] = core.issued[pipe];
    return;
  }
  Clock all{};
  for (int p = 0; p < kPipes; ++p) Join(all, Snapshot(core, p));
  for (Clock& known : core.known) Join(known, all);
}

inline void Send(std::deque<Clock>& queue, const Clock& clock, int flag) {
  SHIM_CHECK(queue.size() < kMostSets, Current().name + ": flag " + std::to_string(flag) +
                                           " is set more than 15 times without a wait");
  queue.push_back(clock);
}

inline void SetCrossFlag(int mode, int pipe, int flag) {
  Core& core = Current();
  SHIM_CHECK(mode == 2, "only cross-core mode 2 is in this shim");
  SHIM_CHECK(flag >= 0 && flag < kFlags, "cross-core flags are 0 to 10");
  const Clock clock = Snapshot(core, pipe);
  if (core.index == 0) {
    for (int v = 1; v < kGroupCores; ++v) Send(TheMachine()->group[v]->flags[flag], clock, flag);
    return;
  }
  Core& cube = *TheMachine()->group[0];
  Send(core.index == 1 ? cube.flags[flag] : cube.second[flag], clock, flag);
}

// The scalar unit waits, and so does every instruction after it.
inline void AwaitCrossFlag(int flag) {
  Core& core = Current();
  const auto ready = [&] {
    return !core.flags[flag].empty() && (core.index != 0 || !core.second[flag].empty());
  };
  while (!ready()) {
    core.waiting = true;
    swapcontext(&core.context, &TheMachine()->scheduler);
  }
  core.waiting = false;
  Join(core.known[PIPE_S], core.flags[flag].front());
  core.flags[flag].pop_front();
  if (core.index != 0) return;
  Join(core.known[PIPE_S], core.second[flag].front());
  core.second[flag].pop_front();
}

}  // namespace shim

// Runs a kernel's blocks, each a cube core and two vector cores that take turns where they wait.
#pragma once

#include "kernel_operator.h"

namespace shim {

using Body = std::function<void()>;

inline Body*& TheBody() {
  static Body* body = nullptr;
  return body;
}

// What a core leaves behind: signals that nobody waited for, tensors never freed.
inline void CheckEnd(const Core& core) {
  SHIM_CHECK(core.late.empty(), core.late);
  for (int flag = 0; flag < kFlags; ++flag)
    SHIM_CHECK(core.flags[flag].empty() && core.second[flag].empty(),
               core.name + ": flag " + std::to_string(flag) + " is set, and nobody waits for it");
  SHIM_CHECK(core.events.empty(), core.name + ": SetFlag without WaitFlag");
}

inline void CoreEntry() {
  Core& core = Current();
  try {
    (*TheBody())();
  } catch (const std::exception& error) {
    core.fault = error.what();
  }
  core.done = true;
}

inline void GiveMemories(Core& core) {
  const auto give = [&](Kind kind, const char* name, int64_t kib) {
    core.memories[kind] = std::make_unique<Memory>(name, kib * 1024);
  };
  if (core.index == 0) {
    give(kL1, "L1", 512);
    give(kL0A, "L0A", 64);
    give(kL0B, "L0B", 64);
    give(kL0C, "L0C", 128);
  } else {
    give(kUnified, "the unified buffer", 192);
  }
}

// One turn of every core that is not done; a fault of any ends the run.
inline bool Turn(Machine& machine, std::array<Core, kGroupCores>& cores) {
  bool moved = false;
  for (Core& core : cores) {
    if (core.done) continue;
    const auto before = core.issued;
    const bool was_waiting = core.waiting;
    machine.current = &core;
    swapcontext(&machine.scheduler, &core.context);
    SHIM_CHECK(core.fault.empty(), core.fault);
    moved |= core.done || before != core.issued || was_waiting != core.waiting;
  }
  return moved;
}

inline void RunBlock(Machine& machine, int block) {
  std::array<Core, kGroupCores> cores;
  for (int index = 0; index < kGroupCores; ++index) {
    Core& core = cores[index];
    core.block = block;
    core.index = index;
    core.name = index == 0 ? "cube core" : "vector core " + std::to_string(index);
    GiveMemories(core);
    core.stack.resize(1 << 18);
    getcontext(&core.context);
    core.context.uc_stack.ss_sp = core.stack.data();
    core.context.uc_stack.ss_size = core.stack.size();
    core.context.uc_link = &machine.scheduler;
    makecontext(&core.context, CoreEntry, 0);
    machine.group[index] = &core;
  }
  const auto running = [&] {
    for (const Core& core : cores)
      if (!core.done) return true;
    return false;
  };
  while (running())
    SHIM_CHECK(Turn(machine, cores), "deadlock: the cores wait for flags that nobody sets");
  for (const Core& core : cores) {
    CheckEnd(core);
    for (int kind = 0; kind < kKinds; ++kind)
      if (core.memories[kind])
        machine.peak[kind] = std::max(machine.peak[kind], core.memories[kind]->taken);
  }
}

// Throws Fault. The machine's global arrays are the caller's.
inline void Launch(Machine& machine, Body body) {
  TheMachine() = &machine;
  TheBody() = &body;
  for (int block = 0; block < machine.blocks; ++block) RunBlock(machine, block);
}

}  // namespace shim

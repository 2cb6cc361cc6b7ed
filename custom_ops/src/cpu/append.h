// Writes the new tokens into the cache, and the past where it is another buffer.
#pragma once

#include "kernel.h"

namespace trianglemix::cpu {

// Fills present_key and present_value. Null on success, else a text.
const char* Append(const TriangleProblem& problem, ParallelFor& pool);

}  // namespace trianglemix::cpu

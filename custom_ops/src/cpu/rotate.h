// Turns the heads of new queries and keys by their position's angles (rotary embedding).
#pragma once

#include "../problem.h"

namespace trianglemix::cpu {

// Writes the `problem.head_size` numbers at `from` to `to`, turned as its rotation says for
// `position` (which is brought into the rotation's positions); without a rotation a plain copy.
// Sums are float32 and rounded once. `from` and `to` do not overlap.
void RotateHead(const AttentionProblem& problem, int64_t position, const char* from, char* to);

}  // namespace trianglemix::cpu

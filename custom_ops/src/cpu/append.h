// Readies a call for attention: writes the new tokens into the cache, and the past where it is
// another buffer; turns keys and queries where the node rotates.
#pragma once

#include "kernel.h"

namespace trianglemix::cpu {

// Fills present_key and present_value, and puts the queries into the output where the problem
// prepares_queries(). Null on success, else a text.
const char* Append(const AttentionProblem& problem, ParallelFor& pool);

// The problem with its queries where attention finds them after Append().
AttentionProblem Appended(const AttentionProblem& problem);

}  // namespace trianglemix::cpu

// What the work loop and the kernels of each instruction set share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "../tiles.h"
#include "plan.h"

namespace trianglemix::cpu {

// The kernel of one instruction set.
struct Variant {
  const char* name;
  int64_t panel_rows;  // rows that share a visit to a key

  // Floats of scratch for one tile, and of one partial result.
  size_t (*scratch_floats)(const TriangleProblem& problem);
  size_t (*partial_floats)(const TriangleProblem& problem);

  // Computes one tile. Writes the output rows where `partial` is null, else only the partial
  // result.
  void (*attend)(const TriangleProblem& problem, const BatchRow& row, const Tile& tile,
                 float* scratch, float* partial);

  // Merges the `pieces` partial results of a split tile, one after the other in `partials`, and
  // writes the output rows.
  void (*merge)(const TriangleProblem& problem, const BatchRow& row, const Tile& tile,
                float* scratch, float* partials, int64_t pieces);
};

// The kernel for this processor.
const Variant& ChooseVariant();

extern const Variant kPlainVariant;
#if defined(__x86_64__)
extern const Variant kAvx2Variant;
extern const Variant kAvx512Variant;
#endif

}  // namespace trianglemix::cpu

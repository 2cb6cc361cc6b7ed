// A small stand-in for the header that an AscendC kernel includes: the instructions that ours uses,
// run on a CPU and checked. Written from public documents, not from CANN's sources.
#pragma once

#include "cube.h"
#include "vector.h"

#define ASCEND_IS_AIC (shim::Current().index == 0)
#define ASCEND_IS_AIV (shim::Current().index != 0)
#define REGISTER_TILING_DEFAULT(TYPE) using TilingType = TYPE
#define GET_TILING_DATA(NAME, FROM) \
  const TilingType& NAME = *reinterpret_cast<const TilingType*>(FROM)
#define KERNEL_TASK_TYPE_DEFAULT(TYPE)

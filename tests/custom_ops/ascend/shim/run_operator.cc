// The operator's kernels as they are: float16, then bfloat16.
#include "run_operator.h"

#define DTYPE_QUERY half
#define triangle_attention triangle_attention_half
#include "triangle_attention.cpp"
#undef DTYPE_QUERY
#undef triangle_attention
#define DTYPE_QUERY bfloat16_t
#define triangle_attention triangle_attention_bfloat16
#include "triangle_attention.cpp"

const Kernel kKernels[] = {triangle_attention_half, triangle_attention_bfloat16};

// Hopper's warpgroup matrix instructions: D[64, N] (+)= A[64, 16] B[16, N], float32 sums.
//
// A comes from shared memory (scores: Q) or from registers (values: P); B always from shared
// memory, "K-major" for scores (K as it lies, [keys][D]) and "MN-major" for values (V as it lies).
// Operand lists are spelt out because inline assembly cannot loop over them.
#pragma once

#include "ptx.cuh"

namespace trianglemix {

// Low word of a shared-memory matrix descriptor: where it starts, and the distance of two slabs
// (read for MN-major only). It may be moved by adding bytes / 16, a cheap step: the high word,
// which says that rows of a slab lie `kSwizzle` bytes apart and eight form an atom, is a constant.
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address, int leading) {
  return address >> 4 | static_cast<uint32_t>(leading >> 4) << 16;
}
template <int kSwizzle>
constexpr uint32_t kDescriptorHigh = (8 * kSwizzle >> 4) | (kSwizzle == 128 ? 1u : 2u) << 30;

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads and writes of accumulators across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Scores: A and B from shared memory, both K-major; `accumulate` false overwrites.
template <typename T, int kSwizzle>
struct Wgmma;

// clang-format off
#define TM_NAMES_24 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define TM_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TM_NAMES_48 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TM_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TM_NAMES_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TM_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TM_F24(d, i) TM_F8(d, i), TM_F8(d, i + 8), TM_F8(d, i + 16)
#define TM_F32(d, i) TM_F24(d, i), TM_F8(d, i + 24)
#define TM_F48(d, i) TM_F24(d, i), TM_F24(d, i + 24)
#define TM_F64(d, i) TM_F32(d, i), TM_F32(d, i + 32)
#define TM_F128(d, i) TM_F64(d, i), TM_F64(d, i + 64)

// Scores of N keys: R = N / 2 accumulators, then operands A, B, and whether to accumulate.
#define TM_SCORES(N, R, A, B, P, H, TYPE) \
  static __device__ __forceinline__ void scores(float (&d)[R], uint32_t a, uint32_t b, int add) { \
    asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, " P ", 0;\n" \
      "mov.b64 a, {" A ", " H "};\nmov.b64 b, {" B ", " H "};\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
      " {" TM_NAMES_##R "}, a, b, p, 1, 1, 0, 0;\n}\n" \
      : TM_F##R(d, 0) : "r"(a), "r"(b), "r"(add), "n"(kDescriptorHigh<kSwizzle>)); \
  }
// Values of head size N: A is four registers of P, B is MN-major.
#define TM_VALUES(N, R, A0, A1, A2, A3, B, P, H, TYPE) \
  static __device__ __forceinline__ void values(float (&d)[R], uint32_t a0, uint32_t a1, \
                                                uint32_t a2, uint32_t a3, uint32_t b, int add) { \
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, " P ", 0;\n" \
      "mov.b64 b, {" B ", " H "};\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
      " {" TM_NAMES_##R "}, {" A0 ", " A1 ", " A2 ", " A3 "}, b, p, 1, 1, 1;\n}\n" \
      : TM_F##R(d, 0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b), "r"(add), \
        "n"(kDescriptorHigh<kSwizzle>)); \
  }
#define TM_WGMMA(CPP, TYPE) \
  template <int kSwizzle> \
  struct Wgmma<CPP, kSwizzle> { \
    TM_SCORES(48, 24, "%24", "%25", "%26", "%27", TYPE) \
    TM_SCORES(64, 32, "%32", "%33", "%34", "%35", TYPE) \
    TM_SCORES(128, 64, "%64", "%65", "%66", "%67", TYPE) \
    TM_VALUES(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", TYPE) \
    TM_VALUES(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", TYPE) \
    TM_VALUES(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", TYPE) \
    TM_VALUES(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", TYPE) \
  };
TM_WGMMA(__nv_bfloat16, "bf16")
TM_WGMMA(__half, "f16")
// clang-format on

}  // namespace trianglemix

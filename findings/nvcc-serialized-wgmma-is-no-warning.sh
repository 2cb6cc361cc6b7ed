#!/bin/bash
# nvcc 13.0 lets serialized warpgroup products through -Werror: it tells of them as "info".
#
# The loop keeps one product of Hopper's tensor cores under way over its back edge, while it uses the
# sums of the one before. ptxas cannot follow that (C7514) and waits for each product where it is set
# out: the program is right, and the exponentials, which were to run beside the products, never do.
# The message is an "info", so `-Werror all-warnings` and ptxas's own `-Werror` end with 0; only who
# reads the log learns of it. With both products inside one iteration ptxas says nothing, and waits
# once for each behind the exponentials. Exits with 1 where that is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.88
cat > "$place/products.cuh" <<'CUDA'
#include <cstdint>

// Sets out for sums[64, 8] = A[64, 16] B[16, 8] of a warpgroup: four numbers a thread.
__device__ __forceinline__ void set_out(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait(float (&d)[4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ float use(const float (&d)[4]) {
  return exp2f(d[0]) + exp2f(d[1]) + exp2f(d[2]) + exp2f(d[3]);
}
CUDA
cat > "$place/over_the_edge.cu" <<'CUDA'
#include "products.cuh"
__global__ void __launch_bounds__(128) sums(float* out, uint64_t a, uint64_t b, int tiles) {
  float s[2][4] = {}, sum = 0.0f;
  set_out(s[0], a, b);
#pragma unroll 1
  for (int tile = tiles; tile > 0; tile -= 2) {
    set_out(s[1], a + tile, b);
    wait<1>(s[0]);
    sum += use(s[0]);
    set_out(s[0], a + tile + 1, b);
    wait<1>(s[1]);
    sum += use(s[1]);
  }
  out[threadIdx.x] = sum;
}
CUDA
cat > "$place/inside.cu" <<'CUDA'
#include "products.cuh"
__global__ void __launch_bounds__(128) sums(float* out, uint64_t a, uint64_t b, int tiles) {
  float s[2][4] = {}, sum = 0.0f;
  set_out(s[0], a, b);
  wait<0>(s[0]);
#pragma unroll 1
  for (int tile = tiles; tile > 0; tile -= 2) {
    set_out(s[1], a + tile, b);
    sum += use(s[0]);
    wait<0>(s[1]);
    set_out(s[0], a + tile + 1, b);
    sum += use(s[1]);
    wait<0>(s[0]);
  }
  out[threadIdx.x] = sum;
}
CUDA
nvcc=$(find "$place/env" -path '*bin/nvcc')
"$nvcc" --version | tail -n 1
build() {
    "$nvcc" -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Werror all-warnings \
        -Xptxas -Werror -I"$place" -cubin -o "$place/$1.cubin" "$place/$1.cu" > "$place/$1.log" 2>&1
    echo "$1: exit $?, $(grep -c C7514 "$place/$1.log" || true) serialized"
}
build over_the_edge | tee "$place/result"
build inside | tee -a "$place/result"
grep -q "over_the_edge: exit 0, 1 serialized" "$place/result"
grep -q "inside: exit 0, 0 serialized" "$place/result"
# Seen 2026-11-28:
#   Build cuda_13.0.r13.0/compiler.36424714_0
#   over_the_edge: exit 0, 1 serialized
#   inside: exit 0, 0 serialized

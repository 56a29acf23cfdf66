// The float16 weight, N x K, that a packed one of 8 or 4 bits stands for.
//
// Compiled by NVRTC with BITS defined. Each thread unpacks 16 bytes.

#include "fragments.cuh"

#define GROUP Format<BITS>::GROUP

__device__ inline u32 scaled(u32 pair, u32 scale) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(pair), "r"(scale));
  return d;
}

extern "C" __global__ void unpack_weight(const uint4* packed, const u16* scales, u16* weight, int N,
                                         int K) {
  int groups = K / GROUP, lane = threadIdx.x % 32;
  int block = (blockIdx.x * blockDim.x + threadIdx.x) / 32;  // of 512 bytes
  if (block >= (N + CHANNELS - 1) / CHANNELS * groups) return;
  uint4 w = packed[block * 32 + lane];
  int channel = block / groups * CHANNELS + lane / 4, k = block % groups * GROUP + lane % 4 * 8;
  unpack<BITS>(&w, [&](const u32* near, const u32* far, int half) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      int row = channel + 8 * which;
      if (row >= N) continue;
      const u32* pairs = which ? far : near;
      u32 scale = scales[row] * 0x10001u;
      uint4 out = {scaled(pairs[0], scale), scaled(pairs[1], scale), scaled(pairs[2], scale),
                   scaled(pairs[3], scale)};
      *(uint4*)(weight + (long long)row * K + k + 32 * half) = out;
    }
  });
}

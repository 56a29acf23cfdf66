// The sums of a product of 64 channels and COUNT rows, as each thread of four warps has them: at 4 i + 2 k + j that of
// channel 16 warp + lane / 4 + 8 k and row 8 i + lane % 4 * 2 + j.

#pragma once

#include "halves.cuh"

// Calls store(row, 8 k, sum) for each.
template <int COUNT, typename Store>
__device__ inline void store_sums(const float* sums, Store store) {
#pragma unroll
  for (int i = 0; i < COUNT / 8; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int j = 0; j < 2; ++j) store(8 * i + threadIdx.x % 4 * 2 + j, 8 * k, sums[4 * i + 2 * k + j]);
}

// Calls store(row, 8 k, pair) with the halves of an even channel and of the one behind it, of what become(sum, k) is.
// For that, lanes of an even channel and the odd one behind it exchange a row, so that each has both channels of one.
template <int COUNT, typename Become, typename Store>
__device__ inline void store_pairs(const float* sums, Become become, Store store) {
  bool odd = threadIdx.x & 4;
#pragma unroll
  for (int i = 0; i < COUNT / 8; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float first = become(sums[4 * i + 2 * k], k), second = become(sums[4 * i + 2 * k + 1], k);
      float other = __shfl_xor_sync(~0u, odd ? first : second, 4);
      u32 pair = float_to_half(odd ? other : first) | (u32)float_to_half(odd ? second : other) << 16;
      store(8 * i + threadIdx.x % 4 * 2 + odd, 8 * k, pair);
    }
}

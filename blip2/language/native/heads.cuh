// How a warp reads heads: PIECES lanes have 16 bytes of a key or value each, so that it attends to
// ABREAST slots of the cache at a time. HEAD_SIZE is a multiple of 8, at most 256.

#pragma once

#include "fragments.cuh"

#define PIECES (HEAD_SIZE / 8)
#define ABREAST (32 / PIECES)
static_assert(HEAD_SIZE % 8 == 0 && HEAD_SIZE <= 256, "a warp does not read heads of this size");

// The sum over the PIECES lanes of a slot, in each of them.
__device__ inline float piece_sum(float x) {
  int lane = threadIdx.x % 32, piece = lane % PIECES;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    if (offset >= PIECES) continue;
    float other = __shfl_down_sync(~0u, x, offset);
    if (piece < offset && piece + offset < PIECES) x += other;
  }
  return __shfl_sync(~0u, x, lane - piece);
}

// The product of a query and a slot's key, of which a lane has its 8 numbers; in each of its lanes.
__device__ inline float score_of(uint4 key, const float* query) {
  float k[8], score = 0;
  to_floats(key, k);
#pragma unroll
  for (int j = 0; j < 8; ++j) score += k[j] * query[j];
  return piece_sum(score);
}

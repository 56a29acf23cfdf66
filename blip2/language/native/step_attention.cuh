// Attention of the new token over the cache, to which its key and value are added. Each block of
// step.cu takes a head, or several where there are more heads than blocks.

#pragma once

#define HEAD_SIZE (WIDTH / HEADS)

#include "heads.cuh"
#include "step_marks.cuh"

static_assert(HEAD_SIZE <= THREADS, "a block has fewer threads than a head has numbers");

#define PASS (WARPS * ABREAST)      // slots that a block attends to at a time
#define EARLY (PASS >= 60 ? 1 : 2)  // passes whose keys and values are read ahead

struct Attention {
  // Shared memory that `run` needs.
  static constexpr int SCRATCH_BYTES = 4 * ((2 + WARPS) * HEAD_SIZE + 2 * WARPS + WARPS % 2 * 2);

  u16 *keys, *values;  // of the layer: HEADS x max_len x HEAD_SIZE
  int max_len, length;
  uint4 key[EARLY], value[EARLY];

  static __device__ int slot_of(int pass) {
    int lane = threadIdx.x % 32;
    return pass * PASS + threadIdx.x / 32 * ABREAST + min(lane / PIECES, ABREAST - 1);
  }

  __device__ void read(int head, int slot, uint4& k, uint4& v) const {
    k = v = uint4{0, 0, 0, 0};
    if (slot >= length || head >= HEADS) return;
    long long at = ((long long)head * max_len + slot) * HEAD_SIZE + threadIdx.x % 32 % PIECES * 8;
    k = *(const uint4*)(keys + at);
    v = *(const uint4*)(values + at);
  }

  // What is known before the query is.
  __device__ void prefetch(int head) {
#pragma unroll
    for (int pass = 0; pass < EARLY; ++pass) read(head, slot_of(pass), key[pass], value[pass]);
  }

  // Each group of PIECES lanes keeps an online softmax of its slots.
  struct Mix {
    float highest = -1e30f, weight = 0, mixed[8] = {};

    __device__ void add(float score, const float* v) {
      float higher = fmaxf(highest, score), fade = __expf(highest - higher), w = __expf(score - higher);
      highest = higher;
      weight = weight * fade + w;
#pragma unroll
      for (int j = 0; j < 8; ++j) mixed[j] = mixed[j] * fade + w * v[j];
    }
  };

  // `own`: the new token's key, and HEAD_SIZE on its value.
  __device__ void attend(Mix& mix, const float (&query)[8], const u16* own, int slot, uint4 key,
                         uint4 value) const {
    if (slot == length) key = *(const uint4*)own, value = *(const uint4*)(own + HEAD_SIZE);
    float score = score_of(key, query), v[8];
    to_floats(value, v);
    mix.add(slot <= length ? score : -1e30f, v);
  }

  __device__ void run(const float* qkv, float* attended, float* scratch, u32 mark) {
    float *whole_query = scratch, *mixed = whole_query + HEAD_SIZE;
    float *highest = mixed + WARPS * HEAD_SIZE, *weight = highest + WARPS;
    u16* whole_own = (u16*)(weight + WARPS + WARPS % 2 * 2);  // aligned to 16 bytes
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, piece = lane % PIECES * 8;
    const u16* own = whole_own + piece;
#pragma unroll 1
    for (int head = blockIdx.x; head < HEADS; head += BLOCKS) {
      if (head != blockIdx.x) prefetch(head);
      for (int i = threadIdx.x; i < 3 * HEAD_SIZE; i += THREADS) {
        int which = i / HEAD_SIZE, d = i % HEAD_SIZE;
        u16 half = float_to_half(read_marked(qkv + (which * HEADS + head) * HEAD_SIZE + d, mark));
        long long slot = ((long long)head * max_len + length) * HEAD_SIZE + d;
        if (which == 0)
          whole_query[d] = half_to_float(half) * rsqrtf(HEAD_SIZE);
        else
          whole_own[i - HEAD_SIZE] = (which == 1 ? keys : values)[slot] = half;
      }
      sync();
      float query[8];
      *(float4*)query = *(const float4*)(whole_query + piece);
      *(float4*)(query + 4) = *(const float4*)(whole_query + piece + 4);

      Mix mix;
#pragma unroll
      for (int pass = 0; pass < EARLY; ++pass)
        attend(mix, query, own, slot_of(pass), key[pass], value[pass]);
#pragma unroll 1
      for (int pass = EARLY; pass * PASS <= length; ++pass) {
        uint4 k, v;
        read(head, slot_of(pass), k, v);
        attend(mix, query, own, slot_of(pass), k, v);
      }
      // The groups of a warp, then the warps.
      float best = mix.highest;
#pragma unroll
      for (int other = 1; other < ABREAST; ++other)
        best = fmaxf(best, __shfl_sync(~0u, mix.highest, (lane + other * PIECES) % (ABREAST * PIECES)));
      float fade = lane < ABREAST * PIECES ? __expf(mix.highest - best) : 0;
      mix.weight *= fade;
#pragma unroll
      for (int j = 0; j < 8; ++j) mix.mixed[j] *= fade;
      float total = mix.weight, sums[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] = mix.mixed[j];
#pragma unroll
      for (int other = 1; other < ABREAST; ++other) {
        int from = lane % PIECES + other * PIECES;
        total += __shfl_sync(~0u, mix.weight, from);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j] += __shfl_sync(~0u, mix.mixed[j], from);
      }
      if (lane < PIECES)
#pragma unroll
        for (int j = 0; j < 8; ++j) mixed[warp * HEAD_SIZE + lane * 8 + j] = sums[j];
      if (lane == 0) highest[warp] = best, weight[warp] = total;
      sync();
      if (threadIdx.x < HEAD_SIZE) {
        float all = -1e30f, sum = 0, norm = 0;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) all = fmaxf(all, highest[other]);
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
          float fade = __expf(highest[other] - all);
          norm += fade * weight[other];
          sum += fade * mixed[other * HEAD_SIZE + threadIdx.x];
        }
        write_marked(attended + head * HEAD_SIZE + threadIdx.x, sum / norm, mark);
      }
      sync();  // scratch is read: the next head, or what is laid out next, may be written there
    }
  }
};

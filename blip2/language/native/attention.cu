// Attention of each row's new token over its cache, to which its key and value are added.
//
// A block has one head of one row. Each of its warps reads PASSES times ABREAST slots before it
// multiplies the first of them; those of its first turn before waiting for the kernel before (PDL), as
// the cache is from earlier steps. Each group of PIECES lanes keeps an online softmax of its slots.
//
// Compiled by NVRTC with HEAD_SIZE and WARPS defined: one warp is best where there are many heads, as
// then most is read at a time, several where there are few.

#include "heads.cuh"

#define PASSES 6

struct Slots {
  uint4 key[PASSES], value[PASSES];
};

struct Mix {
  float highest, weight, mixed[8];
};

struct Reader {
  const u16 *keys, *values;
  const int* sources;
  int heads, head, max_len, length;

  // Of the slots start + pass * ABREAST, this lane's.
  __device__ void read(Slots& slots, int start) const {
    int lane = threadIdx.x % 32, source[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      int slot = start + pass * ABREAST;
      source[pass] = slot < length ? sources[slot] : 0;
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      int slot = start + pass * ABREAST;
      slots.key[pass] = slots.value[pass] = uint4{0, 0, 0, 0};
      if (slot >= length) continue;
      long long at = (((long long)source[pass] * heads + head) * max_len + slot) * HEAD_SIZE + lane % PIECES * 8;
      slots.key[pass] = *(const uint4*)(keys + at);
      slots.value[pass] = *(const uint4*)(values + at);
    }
  }
};

__device__ inline void attend(Mix& mix, const Slots& slots, const float* query, int start, int length) {
  float scores[PASSES], higher = mix.highest;
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    scores[pass] = score_of(slots.key[pass], query);
    if (start + pass * ABREAST < length) higher = fmaxf(higher, scores[pass]);
  }
  float fade = __expf(mix.highest - higher);
  mix.highest = higher;
  mix.weight *= fade;
#pragma unroll
  for (int j = 0; j < 8; ++j) mix.mixed[j] *= fade;
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    float value[8], weight = start + pass * ABREAST < length ? __expf(scores[pass] - higher) : 0;
    to_floats(slots.value[pass], value);
    mix.weight += weight;
#pragma unroll
    for (int j = 0; j < 8; ++j) mix.mixed[j] += weight * value[j];
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attention(const u16* qkv, u16* keys, u16* values, const long long* lengths, const int* sources,
              u16* out, int max_len, float softmax_scale) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int head = blockIdx.x, heads = gridDim.x, row = blockIdx.y;
  int group = lane / PIECES, piece = lane % PIECES * 8;
  int length = lengths[row];
  bool first_group = group == 0 && warp == 0;
  if (group >= ABREAST) group = length;  // lanes to spare: no slot is theirs
  int slot = warp * PASSES * ABREAST + group;
  Reader reader{keys, values, sources + row * max_len, heads, head, max_len, length};
  Slots slots;
  reader.read(slots, slot);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const u16* own = qkv + ((long long)row * 3 * heads + head) * HEAD_SIZE + piece;
  uint4 key = *(const uint4*)(own + heads * HEAD_SIZE), value = *(const uint4*)(own + 2 * heads * HEAD_SIZE);
  if (first_group) {
    long long at = (((long long)row * heads + head) * max_len + length) * HEAD_SIZE + piece;
    *(uint4*)(keys + at) = key;
    *(uint4*)(values + at) = value;
  }
  float query[8], own_key[8], score = 0;
  to_floats(*(const uint4*)own, query), to_floats(key, own_key);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    query[j] *= softmax_scale;
    score += query[j] * own_key[j];
  }
  // The new token is the first group's.
  Mix mix{piece_sum(score), first_group ? 1.0f : 0.0f};
  to_floats(value, mix.mixed);
#pragma unroll
  for (int j = 0; j < 8; ++j) mix.mixed[j] *= mix.weight;
  attend(mix, slots, query, slot, length);
#pragma unroll 1
  for (int turn = WARPS * PASSES * ABREAST; turn < length; turn += WARPS * PASSES * ABREAST) {
    reader.read(slots, turn + slot);
    attend(mix, slots, query, turn + slot, length);
  }

  // The groups of a warp, then the warps.
  float highest = mix.highest, weight = 0, mixed[8] = {};
#pragma unroll
  for (int other = 0; other < ABREAST; ++other)
    highest = fmaxf(highest, __shfl_sync(~0u, mix.highest, other * PIECES));
  float faded = __expf(mix.highest - highest);
#pragma unroll
  for (int other = 0; other < ABREAST; ++other) {
    int from = other * PIECES + lane % PIECES;
    weight += __shfl_sync(~0u, mix.weight * faded, from);
#pragma unroll
    for (int j = 0; j < 8; ++j) mixed[j] += __shfl_sync(~0u, mix.mixed[j] * faded, from);
  }
#if WARPS > 1
  __shared__ float highests[WARPS], weights[WARPS], all_mixed[WARPS][HEAD_SIZE];
  if (lane == 0) highests[warp] = highest, weights[warp] = weight;
  if (lane < PIECES)
#pragma unroll
    for (int j = 0; j < 8; ++j) all_mixed[warp][piece + j] = mixed[j];
  __syncthreads();
  if (!first_group) return;
#pragma unroll
  for (int other = 1; other < WARPS; ++other) highest = fmaxf(highest, highests[other]);
  weight = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) mixed[j] = 0;
#pragma unroll
  for (int other = 0; other < WARPS; ++other) {
    float fade = __expf(highests[other] - highest);
    weight += weights[other] * fade;
#pragma unroll
    for (int j = 0; j < 8; ++j) mixed[j] += all_mixed[other][piece + j] * fade;
  }
#endif
#pragma unroll
  for (int j = 0; j < 8; ++j) mixed[j] /= weight;
  uint2 low = to_halves(mixed), high = to_halves(mixed + 4);
  if (first_group)
    *(uint4*)(out + ((long long)row * heads + head) * HEAD_SIZE + piece) = uint4{low.x, low.y, high.x, high.y};
}

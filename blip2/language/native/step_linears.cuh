// The linears of step.cu: a block multiplies its share of the weights, slab by slab as they arrive, and
// adds up what its warps have.

#pragma once

#include "step_inputs.cuh"
#include "step_weights.cuh"

// Packed weights are multiplied as they are (but for E4M3): a byte or nibble n alone is the float16 n / 2^24, an
// upper nibble 16 n / 2^24. What they are biased by is taken off by way of the inputs' sum.
template <int bits>
struct Packed {
  static constexpr bool PLAIN = Format<bits>::PLAIN;
  static constexpr float UNIT = PLAIN ? 1.0f : 16777216.0f;
  static constexpr float BIAS = PLAIN ? 0.0f : (1 << (bits - 1)) / UNIT;

  // sums += a slab's products; for 4 bits the last two of them 16 times too large.
  static __device__ void multiply(float (*sums)[4], const uint4* w, const uint4* inputs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 x = inputs[Format<bits>::HALF / 8 * half];
      if constexpr (Format<bits>::IS_FLOAT8) {
        u32 near[4], far[4];
        unpack_float8(half ? w[0].z : w[0].x, near);
        unpack_float8(half ? w[0].w : w[0].y, near + 2);
        unpack_float8(half ? w[1].z : w[1].x, far);
        unpack_float8(half ? w[1].w : w[1].y, far + 2);
        mma(sums[2 * half], near[0], far[0], near[1], far[1], x.x, x.y);
        mma(sums[2 * half + 1], near[2], far[2], near[3], far[3], x.z, x.w);
      } else if constexpr (bits == 16) {
        const uint4 &near = w[2 * half], &far = w[2 * half + 1];
        mma(sums[2 * half], near.x, far.x, near.y, far.y, x.x, x.y);
        mma(sums[2 * half + 1], near.z, far.z, near.w, far.w, x.z, x.w);
      } else if constexpr (bits == 8) {
        const uint4& q = w[half];
        mma(sums[2 * half], low(q.x), low(q.z), high(q.x), high(q.z), x.x, x.y);
        mma(sums[2 * half + 1], low(q.y), low(q.w), high(q.y), high(q.w), x.z, x.w);
      } else {
        u32 near = half ? w[0].z : w[0].x, far = half ? w[0].w : w[0].y;
        u32 near_later = near >> 8, far_later = far >> 8;
        const u32 low = 0x000f000f, high = 0x00f000f0;
        mma(sums[half], near & low, far & low, near_later & low, far_later & low, x.x, x.z);
        mma(sums[2 + half], near & high, far & high, near_later & high, far_later & high, x.y, x.w);
      }
    }
  }

  static __device__ u32 low(u32 q) { return __byte_perm(q, 0, 0x4140); }
  static __device__ u32 high(u32 q) { return __byte_perm(q, 0, 0x4342); }

  static __device__ float total(float (*sums)[4], int i) {
    float last = sums[2][i] + sums[3][i];
    return sums[0][i] + sums[1][i] + (bits == 4 ? last / 16 : last);
  }
};

// Sums a block's slabs [slab, end) of at most CHUNK tiles; thread o gets output o of them, in units
// of 1 / UNIT.
template <int WHICH>
__device__ inline float product(Ring& ring, const u16* input, float* partial, int slab, int end) {
  using S = Shape<WHICH>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // The same row for all eight columns of an mma; and a lane's share of the inputs' sum.
  const u16* x = input + warp * 64 + lane % 4 * Format<S::bits>::INPUTS;
  const u16* pair = input + warp * 64 + lane * 2;
  auto pair_sum = [&](int slab) {
    u32 two = *(const u32*)(pair + slab * (WARPS * 64));
    return half_to_float(two) + half_to_float(two >> 16);
  };
  float inputs = 0;
  if (!S::PLAIN && !S::SPLIT) {  // the same for all tiles
#pragma unroll
    for (int i = 0; i < S::SLABS; ++i) inputs += pair_sum(i);
    inputs = warp_sum(inputs);
  }
  float* part = partial + warp * CHANNELS;
  int in_tile = slab % S::SLABS;
#pragma unroll 1
  while (slab < end) {
    int last = min(S::SLABS, in_tile + end - slab);
    slab += last - in_tile;
    float sums[4][4] = {};
#pragma unroll(S::GANG == 1 ? 2 : 1)
    while (in_tile < last) {
      int count = S::SPLIT ? min(S::GANG - in_tile % S::GANG, last - in_tile) : S::GANG;
      uint4 w[S::GANG][S::LOADS];
      u32 stage = ring.wait_full();
#pragma unroll
      for (int i = 0; i < S::GANG; ++i)
        if (i < count) read_slab<WHICH>(stage + i * S::SLAB, w[i]);
      ring.release();
#pragma unroll
      for (int i = 0; i < S::GANG; ++i)
        if (i < count) {
          Packed<S::bits>::multiply(sums, w[i], (const uint4*)(x + (in_tile + i) * (WARPS * 64)));
          if (!S::PLAIN && S::SPLIT) inputs += pair_sum(in_tile + i);
        }
      in_tile += count;
    }
    if (!S::PLAIN && S::SPLIT) inputs = warp_sum(inputs);
    if (lane % 4 == 0) {
      part[lane / 4] = Packed<S::bits>::total(sums, 0) - Packed<S::bits>::BIAS * inputs;
      part[lane / 4 + 8] = Packed<S::bits>::total(sums, 2) - Packed<S::bits>::BIAS * inputs;
    }
    if (S::SPLIT) inputs = 0;
    part += WARPS * CHANNELS;
    in_tile = 0;
  }
  sync();
  const float* parts = partial + threadIdx.x / CHANNELS * (WARPS * CHANNELS) + threadIdx.x % CHANNELS;
  float sum = 0;
  if (threadIdx.x < CHUNK * CHANNELS)
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += parts[other * CHANNELS];
  return sum;
}

template <int WHICH>
__device__ inline float scale_of(const Linear& linear, int channel) {
  using S = Shape<WHICH>;
  return scale_at<S::bits>(linear.scales, min(channel, S::N - 1)) * Packed<S::bits>::UNIT;
}

// A linear whose tiles belong to one block each: store(channel, value) is called for each of the
// block's outputs. The scale and bias of the first chunk are read by `before`, early.
template <int WHICH>
struct Whole {
  using S = Shape<WHICH>;
  float scale, bias;

  __device__ void prefetch(const Linear& linear) { prefetch(linear, S::first_slab(blockIdx.x) / S::SLABS); }

  __device__ void prefetch(const Linear& linear, int tile) {
    int channel = tile * CHANNELS + threadIdx.x;
    scale = scale_of<WHICH>(linear, channel);
    bias = linear.bias ? half_to_float(linear.bias[min(channel, S::N - 1)]) : 0.0f;
  }

  template <typename Store>
  __device__ void run(Ring& ring, const Linear& linear, const u16* input, float* partial, Store store) {
    int tile = S::first_slab(blockIdx.x) / S::SLABS, last = S::first_slab(blockIdx.x + 1) / S::SLABS;
#pragma unroll 1
    while (tile < last) {
      int end = min(tile + CHUNK, last);
      float sum = product<WHICH>(ring, input, partial, tile * S::SLABS, end * S::SLABS);
      int channel = tile * CHANNELS + threadIdx.x;
      if (channel < min(end * CHANNELS, S::N)) store(channel, sum * scale + bias);
      tile = end;
      if (tile == last) break;
      prefetch(linear, tile);
      sync();  // the sums were read: partial may be written again
    }
  }
};

// A linear whose tiles may be shared among blocks: parts of sums go to slots, SLOTS x WIDTH. All SLOTS of
// a channel are written each time.
template <int WHICH>
struct Split {
  using S = Shape<WHICH>;
  float scale;

  __device__ void prefetch(const Linear& linear) {
    scale = scale_of<WHICH>(linear, S::first_slab(blockIdx.x) / S::SLABS * CHANNELS + threadIdx.x);
  }

  __device__ void run(Ring& ring, const u16* input, float* partial, float* slots, u32 mark) {
    int slab = S::first_slab(blockIdx.x), end = S::first_slab(blockIdx.x + 1);
    if (slab == end) return;  // the same for a whole block
    float sum = product<WHICH>(ring, input, partial, slab, end);
    int channel = slab / S::SLABS * CHANNELS + threadIdx.x;
    int tile = channel / CHANNELS, last = tile * S::SLABS + S::SLABS - 1;
    if (channel >= ((end - 1) / S::SLABS + 1) * CHANNELS) return;
    int slot = blockIdx.x - S::block_of(tile * S::SLABS);
    write_marked(slots + slot * WIDTH + channel, sum * scale, mark);
    if (end > last)  // the last to share the tile
      for (++slot; slot < SLOTS; ++slot) write_marked(slots + slot * WIDTH + channel, 0.0f, mark);
  }
};

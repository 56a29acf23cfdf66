// y = x Wᵀ + b for a few rows of x, W in 16, 8 or 4 bits: every weight is read once, at the speed
// of the memory, and goes through the tensor cores (mma.m16n8k16) for up to 8 * TILES rows.
//
// A block owns 16 output channels. Its warps share out the inputs in groups of GROUP and add up
// their sums in shared memory, in a fixed order, so a result never depends on timing. With the
// order of k inside a group chosen freely (a sum does not mind), each thread reads 16 consecutive
// bytes of weights and of x:
//   thread (g = lane / 4, t = lane % 4) takes channels g and g + 8 and, of 32 inputs, 8t .. 8t + 7;
//   the first mma sees 8t .. 8t + 3, the second 8t + 4 .. 8t + 7, as its k = 2t, 2t+1, 2t+8, 2t+9.
// Weights of 16 bits lie as PyTorch has them, N x K; those of 8 and 4 bits are packed in that order
// (linear.py), biased to be unsigned.
//
// Launched dependent on the kernel before (PDL): the first weights are requested before that one
// has finished, since they do not depend on it.
//
// Compiled by NVRTC with BITS, TILES, NORM, RELU, RESIDUAL, OUT_FLOAT, HAS_BIAS defined.

typedef unsigned int u32;
typedef unsigned short u16;

#define WARPS 8
#define CHANNELS 16
#define GROUP (BITS == 4 ? 64 : 32)  // inputs one round of loads covers
#define LOADS (BITS == 16 ? 2 : 1)   // 16-byte loads a thread and group
#define AHEAD (BITS == 16 ? 4 : 5)   // groups requested before they are needed

__device__ inline float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ inline u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

__device__ inline uint4 load_once(const void* at) {  // streamed: no other block reads it
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ inline u32 subtract(u32 a, u32 b) {
  u32 d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ inline u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Four unsigned bytes, biased by 128, to two pairs of float16: 0x64xx is 1024 + xx.
__device__ inline void unpack8(u32 q, u32* pairs) {
  pairs[0] = subtract(__byte_perm(q, 0x64646464, 0x4140), 0x64806480);
  pairs[1] = subtract(__byte_perm(q, 0x64646464, 0x4342), 0x64806480);
}

// Eight nibbles, biased by 8, to four pairs of float16. Pair i is nibbles i and i + 4: those in the
// high half of a byte come out as 1024 + 16 n and are scaled back.
__device__ inline void unpack4(u32 q, u32* pairs) {
  const u32 low = 0x000f000f, high = 0x00f000f0, base = 0x64006400;
  const u32 sixteenth = 0x2c002c00, minus_72 = 0xd480d480;
  u32 later = q >> 8;
  pairs[0] = subtract((q & low) | base, 0x64086408);
  pairs[1] = multiply_add((q & high) | base, sixteenth, minus_72);
  pairs[2] = subtract((later & low) | base, 0x64086408);
  pairs[3] = multiply_add((later & high) | base, sixteenth, minus_72);
}

__device__ inline void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 32 inputs of both channels, as pairs (near: channel g, far: channel g + 8), times 8 * TILES rows.
__device__ inline void multiply32(float (*sums)[4], const u32* near, const u32* far, const uint4* x) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    mma(sums[tile], near[0], far[0], near[1], far[1], x[tile].x, x[tile].y);
    mma(sums[tile], near[2], far[2], near[3], far[3], x[tile].z, x[tile].w);
  }
}

// The weights of one group that this thread multiplies.
__device__ inline void load_weights(uint4* w, const char* weight, int group, int N, int K) {
  int lane = threadIdx.x % 32;
  if (BITS == 16) {
    int channel = blockIdx.x * CHANNELS + lane / 4, k = group * GROUP + lane % 4 * 8;
    long long near = min(channel, N - 1), far = min(channel + 8, N - 1);
    w[0] = load_once(weight + (near * K + k) * 2);
    w[LOADS - 1] = load_once(weight + (far * K + k) * 2);
  } else {
    long long tile = (long long)blockIdx.x * (K / GROUP) + group;
    w[0] = load_once(weight + tile * 512 + lane * 16);
  }
}

#if NORM
// The single row x (float32) through its LayerNorm into shared memory as float16.
__device__ void normalise(const float* x, const u16* norm_weight, const u16* norm_bias, float eps,
                          int K, u16* normed) {
  __shared__ float partial[WARPS];
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  float sum = 0, mean = 0, squares = 0;
  for (int k = thread; k < K; k += 32 * WARPS) sum += x[k];
  for (int pass = 0; pass < 2; ++pass) {
    float part = pass ? squares : sum;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) part += __shfl_xor_sync(~0u, part, offset);
    if (lane == 0) partial[warp] = part;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) total += partial[other];
    __syncthreads();
    if (pass == 0) {
      mean = total / K;
      for (int k = thread; k < K; k += 32 * WARPS) squares += (x[k] - mean) * (x[k] - mean);
    } else {
      squares = total;
    }
  }
  float scale = rsqrtf(squares / K + eps);
  for (int k = thread; k < K; k += 32 * WARPS)
    normed[k] = float_to_half((x[k] - mean) * scale * half_to_float(norm_weight[k]) +
                              half_to_float(norm_bias[k]));
  __syncthreads();
}
#endif

// Eight inputs of each of this thread's rows, starting at k.
__device__ inline void load_inputs(uint4* b, const u16* x, int first_row, int rows, int k, int K) {
  int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    int row = first_row + tile * 8 + g;
    b[tile] = make_uint4(0, 0, 0, 0);
    if (row < rows) b[tile] = *(const uint4*)(x + (long long)row * K + k);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES > 5 ? 1 : TILES > 2 ? 2 : 3)
    linear(const void* x, const u16* norm_weight, const u16* norm_bias, const char* weight,
           const u16* scales, const u16* bias, void* out, int rows, int N, int K, float eps) {
  extern __shared__ uint4 dynamic[];  // NORM: the normalised row
  __shared__ float partial[WARPS][CHANNELS][8 * TILES + 1];
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, t = lane % 4;
  int first_row = blockIdx.y * 8 * TILES;
  int groups = K / GROUP;

  uint4 ahead[AHEAD][LOADS];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i)
    if (warp + i * WARPS < groups) load_weights(ahead[i], weight, warp + i * WARPS, N, K);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

#if NORM
  const u16* input = (const u16*)dynamic;
  normalise((const float*)x, norm_weight, norm_bias, eps, K, (u16*)dynamic);
#else
  const u16* input = (const u16*)x;
#endif

  float sums[TILES][4] = {};
  for (int first = warp; first < groups; first += AHEAD * WARPS) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      int group = first + i * WARPS;
      if (group >= groups) break;
      uint4 w[LOADS];
#pragma unroll
      for (int load = 0; load < LOADS; ++load) w[load] = ahead[i][load];
      if (group + AHEAD * WARPS < groups)
        load_weights(ahead[i], weight, group + AHEAD * WARPS, N, K);
      uint4 b[TILES];
      int k = group * GROUP + t * 8;
      load_inputs(b, input, first_row, rows, k, K);
      if (BITS == 16) {
        multiply32(sums, (const u32*)&w[0], (const u32*)&w[LOADS - 1], b);
      } else if (BITS == 8) {
        u32 near[4], far[4];
        unpack8(w[0].x, near);
        unpack8(w[0].y, near + 2);
        unpack8(w[0].z, far);
        unpack8(w[0].w, far + 2);
        multiply32(sums, near, far, b);
      } else {
        u32 near[4], far[4];
        unpack4(w[0].x, near);
        unpack4(w[0].y, far);
        multiply32(sums, near, far, b);
        load_inputs(b, input, first_row, rows, k + 32, K);
        unpack4(w[0].z, near);
        unpack4(w[0].w, far);
        multiply32(sums, near, far, b);
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      partial[warp][lane / 4 + i / 2 * 8][tile * 8 + t * 2 + i % 2] = sums[tile][i];
  __syncthreads();
  for (int index = thread; index < CHANNELS * 8 * TILES; index += 32 * WARPS) {
    int channel = blockIdx.x * CHANNELS + index % CHANNELS, row = first_row + index / CHANNELS;
    if (channel >= N || row >= rows) continue;
    float y = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other)
      y += partial[other][index % CHANNELS][index / CHANNELS];
    if (BITS < 16) y *= half_to_float(scales[channel]);
    if (HAS_BIAS) y += half_to_float(bias[channel]);
    if (RELU) y = fmaxf(y, 0.0f);
    long long at = (long long)row * N + channel;
    if (OUT_FLOAT)
      ((float*)out)[at] = RESIDUAL ? ((float*)out)[at] + y : y;
    else
      ((u16*)out)[at] = float_to_half(y);
  }
}

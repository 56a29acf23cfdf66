// y = x Wᵀ + b for a few rows of x, W in 16, 8 or 4 bits: every weight is read once, at the speed
// of the memory, and goes through the tensor cores (mma.m16n8k16) for up to 8 * TILES rows.
//
// A block owns 16 output channels at a time. Its warps share out the inputs in groups of GROUP and
// add up their sums in shared memory, in a fixed order, so a result never depends on timing. With the
// order of k inside a group chosen freely (a sum does not mind), each thread reads 16 consecutive
// bytes of weights and of x:
//   thread (g = lane / 4, t = lane % 4) takes channels g and g + 8 and, of 32 inputs, 8t .. 8t + 7;
//   the first mma sees 8t .. 8t + 3, the second 8t + 4 .. 8t + 7, as its k = 2t, 2t+1, 2t+8, 2t+9.
// Weights of 16 bits lie as PyTorch has them, N x K; those of 8 and 4 bits are packed in that order
// (linear.py), biased to be unsigned.
//
// Latency is what counts beside the bytes: a launch lasts a few microseconds. So weights are always
// requested AHEAD groups before their use, across the channels a block works through, and the first
// of them before waiting for the kernel before (PDL), since they do not depend on it. The grid is so
// small that the blocks of two kernels fit on the GPU: the next one's requests keep the memory busy
// while this one finishes.
//
// Compiled by NVRTC with BITS, TILES, NORM, STAGED, RELU, RESIDUAL, OUT_FLOAT, HAS_BIAS and WIDTH,
// the number of inputs, defined. STAGED keeps the one row of inputs in shared memory; NORM needs it.

typedef unsigned int u32;
typedef unsigned short u16;

#define WARPS 4
#define THREADS (32 * WARPS)
#define CHANNELS 16
#define GROUP (BITS == 4 ? 64 : 32)  // inputs one round of loads covers
#define LOADS (BITS == 16 ? 2 : 1)   // 16-byte loads a thread and group
#define AHEAD (TILES > 1 ? 4 : BITS == 16 ? 5 : 10)
#define ROUND (AHEAD * WARPS)  // groups a block has in flight
#define GROUPS (WIDTH / GROUP)
#define OUTPUTS (CHANNELS * 8 * TILES / THREADS)  // a thread's

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

// The weights of one group that this thread multiplies. Past the last group it loads that one again.
__device__ inline void load_weights(uint4* w, const char* weight, int tile, int group, int N) {
  int lane = threadIdx.x % 32;
  group = min(group, GROUPS - 1);
  if (BITS == 16) {
    int channel = tile * CHANNELS + lane / 4, k = group * GROUP + lane % 4 * 8;
    long long near = min(channel, N - 1), far = min(channel + 8, N - 1);
    w[0] = load_once(weight + (near * WIDTH + k) * 2);
    w[LOADS - 1] = load_once(weight + (far * WIDTH + k) * 2);
  } else {
    w[0] = load_once(weight + ((long long)tile * GROUPS + group) * 512 + lane * 16);
  }
}

// The sum over a block, in every thread.
__device__ inline float block_sum(float part, float* partial) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) part += __shfl_xor_sync(~0u, part, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = part;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) total += partial[warp];
  return total;
}

#if NORM
#define OWN ((WIDTH + THREADS - 1) / THREADS)  // inputs a thread normalises

// The single row x (float32) through its LayerNorm into shared memory as float16.
__device__ inline void normalise(const float* x, const u16* weight, const u16* bias, float eps,
                                 u16* normed) {
  __shared__ float partial[2][WARPS];
  float own[OWN], sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    int k = threadIdx.x + i * THREADS;
    own[i] = k < WIDTH ? x[k] : 0;
    sum += own[i];
  }
  float mean = block_sum(sum, partial[0]) / WIDTH;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    if (threadIdx.x + i * THREADS < WIDTH) squares += (own[i] - mean) * (own[i] - mean);
  float scale = rsqrtf(block_sum(squares, partial[1]) / WIDTH + eps);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    int k = threadIdx.x + i * THREADS;
    if (k < WIDTH)
      normed[k] = float_to_half((own[i] - mean) * scale * half_to_float(weight[k]) +
                                half_to_float(bias[k]));
  }
  __syncthreads();
}
#endif

// Eight inputs of each of this thread's rows, starting at k.
__device__ inline void load_inputs(uint4* b, const u16* x, int first_row, int rows, int k) {
  int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    int row = first_row + tile * 8 + g;
    b[tile] = make_uint4(0, 0, 0, 0);
    if (row < rows) b[tile] = *(const uint4*)(x + (long long)row * WIDTH + k);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, TILES > 2 ? 3 : 4)
    linear(const void* x, const u16* norm_weight, const u16* norm_bias, const char* weight,
           const u16* scales, const u16* bias, void* out, int rows, int N, float eps) {
  // Two, so that one tile's sums are read while the next one's are written.
  __shared__ float partial[2][WARPS][CHANNELS][8 * TILES + 1];
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, t = lane % 4;
  int first_row = blockIdx.y * 8 * TILES, tiles = (N + CHANNELS - 1) / CHANNELS;

  uint4 ahead[AHEAD][LOADS];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) load_weights(ahead[i], weight, blockIdx.x, warp + i * WARPS, N);
#if NORM
  __shared__ u16 own_weight[WIDTH], own_bias[WIDTH];
  for (int k = thread; k < WIDTH; k += THREADS) {
    own_weight[k] = norm_weight[k];
    own_bias[k] = norm_bias[k];
  }
#endif

#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

#if STAGED
  __shared__ __align__(16) u16 input[WIDTH];
#if NORM
  normalise((const float*)x, own_weight, own_bias, eps, input);
#else
  for (int k = thread * 8; k < WIDTH; k += THREADS * 8)
    *(uint4*)(input + k) = *(const uint4*)((const u16*)x + k);
  __syncthreads();
#endif
#else
  const u16* input = (const u16*)x;
#endif

  int parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
    float scale[OUTPUTS], offset[OUTPUTS], before[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      int index = thread + i * THREADS, row = first_row + index / CHANNELS;
      int channel = min(tile * CHANNELS + index % CHANNELS, N - 1);
      scale[i] = BITS < 16 ? half_to_float(scales[channel]) : 1.0f;
      offset[i] = HAS_BIAS ? half_to_float(bias[channel]) : 0.0f;
      before[i] = RESIDUAL && row < rows ? ((float*)out)[(long long)row * N + channel] : 0.0f;
    }

    float sums[TILES][4] = {};
    for (int first = warp; first < GROUPS; first += ROUND) {
      bool last = first + ROUND >= GROUPS;
      int next_tile = last ? tile + gridDim.x : tile, next = last ? warp : first + ROUND;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        uint4 w[LOADS];
#pragma unroll
        for (int load = 0; load < LOADS; ++load) w[load] = ahead[i][load];
        if (next_tile < tiles) load_weights(ahead[i], weight, next_tile, next + i * WARPS, N);
        int group = first + i * WARPS;
        if (group >= GROUPS) continue;
        uint4 b[TILES];
        u32 near[4], far[4];
        load_inputs(b, input, first_row, rows, group * GROUP + t * 8);
        if (BITS == 16) {
          multiply32(sums, (const u32*)&w[0], (const u32*)&w[LOADS - 1], b);
        } else if (BITS == 8) {
          unpack8(w[0].x, near);
          unpack8(w[0].y, near + 2);
          unpack8(w[0].z, far);
          unpack8(w[0].w, far + 2);
          multiply32(sums, near, far, b);
        } else {
          unpack4(w[0].x, near);
          unpack4(w[0].y, far);
          multiply32(sums, near, far, b);
          load_inputs(b, input, first_row, rows, group * GROUP + 32 + t * 8);
          unpack4(w[0].z, near);
          unpack4(w[0].w, far);
          multiply32(sums, near, far, b);
        }
      }
    }

#pragma unroll
    for (int part = 0; part < TILES; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        partial[parity][warp][lane / 4 + i / 2 * 8][part * 8 + t * 2 + i % 2] = sums[part][i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      int index = thread + i * THREADS;
      int channel = tile * CHANNELS + index % CHANNELS, row = first_row + index / CHANNELS;
      if (channel >= N || row >= rows) continue;
      float y = 0;
#pragma unroll
      for (int other = 0; other < WARPS; ++other)
        y += partial[parity][other][index % CHANNELS][index / CHANNELS];
      y = y * scale[i] + offset[i];
      if (RELU) y = fmaxf(y, 0.0f);
      long long at = (long long)row * N + channel;
      if (OUT_FLOAT)
        ((float*)out)[at] = before[i] + y;
      else
        ((u16*)out)[at] = float_to_half(y);
    }
  }
}

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
// (cuda.py), biased to be unsigned.
//
// Latency is what counts beside the bytes: a launch lasts a few microseconds. So weights are always
// requested AHEAD groups before their use, and the first of them before waiting for the kernel
// before (PDL), since they do not depend on it. Rows beyond the last repeat the last one: what they
// yield is not stored, and telling them apart would cost instructions.
//
// Compiled by NVRTC with BITS, TILES, WARPS, NORM, STAGED, RELU, RESIDUAL, OUT_FLOAT, HAS_BIAS and
// WIDTH, the number of inputs, defined. STAGED keeps the one row of inputs in shared memory; NORM
// needs it.

typedef unsigned int u32;
typedef unsigned short u16;

#define THREADS (32 * WARPS)
#define CHANNELS 16
#define GROUP (BITS == 4 ? 64 : 32)  // inputs one round of loads covers
#define LOADS (BITS == 16 ? 2 : 1)   // 16-byte loads a thread and group
#define GROUPS (WIDTH / GROUP)
#define SHARE ((GROUPS + WARPS - 1) / WARPS)  // groups a warp multiplies, at most
#define LIMIT (TILES > 1 ? 3 : BITS == 16 ? 5 : STAGED ? 10 : 5)
#define AHEAD (LIMIT < SHARE ? LIMIT : SHARE)
#define INPUTS_AHEAD (TILES <= 2 && !STAGED)  // else they are near: in shared memory, or many
#define OUTPUTS ((CHANNELS * 8 * TILES + THREADS - 1) / THREADS)  // a thread's, at most

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

// Where a thread finds its weights of the groups that its warp multiplies: group warp + i * WARPS.
struct Weights {
  const char *near, *far;

  __device__ Weights(const char* weight, int N) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (BITS == 16) {
      int channel = blockIdx.x * CHANNELS + lane / 4, k = warp * GROUP + lane % 4 * 8;
      near = weight + ((long long)min(channel, N - 1) * WIDTH + k) * 2;
      far = weight + ((long long)min(channel + 8, N - 1) * WIDTH + k) * 2;
    } else {
      near = far = weight + ((long long)blockIdx.x * GROUPS + warp) * 512 + lane * 16;
    }
  }

  __device__ void load(uint4* w, int i) const {
    if (!there(i)) return;
    int step = i * WARPS * (BITS == 16 ? GROUP * 2 : 512);
    w[0] = load_once(near + step);
    if (BITS == 16) w[LOADS - 1] = load_once(far + step);
  }

  static __device__ bool there(int i) {
    return (i + 1) * WARPS <= GROUPS || threadIdx.x / 32 + i * WARPS < GROUPS;
  }
};

// The same for the inputs of its rows.
struct Inputs {
  const u16* row[TILES];

  __device__ Inputs(const u16* x, int first_row, int rows) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      int mine = STAGED ? 0 : min(first_row + tile * 8 + lane / 4, rows - 1);
      row[tile] = x + mine * WIDTH + warp * GROUP + lane % 4 * 8;
    }
  }

  __device__ void load(uint4 (*b)[TILES], int i) const {
    if (!Weights::there(i)) return;
#pragma unroll
    for (int half = 0; half < GROUP / 32; ++half)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        b[half][tile] = *(const uint4*)(row[tile] + i * WARPS * GROUP + 32 * half);
  }
};

__device__ inline void multiply(float (*sums)[4], const uint4* w, uint4 (*b)[TILES]) {
  u32 near[4], far[4];
  if (BITS == 16) {
    multiply32(sums, (const u32*)&w[0], (const u32*)&w[LOADS - 1], b[0]);
  } else if (BITS == 8) {
    unpack8(w[0].x, near);
    unpack8(w[0].y, near + 2);
    unpack8(w[0].z, far);
    unpack8(w[0].w, far + 2);
    multiply32(sums, near, far, b[0]);
  } else {
    unpack4(w[0].x, near);
    unpack4(w[0].y, far);
    multiply32(sums, near, far, b[0]);
    unpack4(w[0].z, near);
    unpack4(w[0].w, far);
    multiply32(sums, near, far, b[GROUP / 32 - 1]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, (TILES > 1 ? 512 : 640) / THREADS)
    linear(const void* x, const u16* norm_weight, const u16* norm_bias, const char* weight,
           const u16* scales, const u16* bias, void* out, int rows, int N, float eps) {
  __shared__ float partial[WARPS][CHANNELS][8 * TILES + 1];
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, t = lane % 4;
  int first_row = blockIdx.y * 8 * TILES;

  uint4 w_ahead[AHEAD][LOADS];
  Weights weights(weight, N);
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) weights.load(w_ahead[i], i);
  float scale[OUTPUTS], offset[OUTPUTS], before[OUTPUTS];
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) {
    int channel = min(blockIdx.x * CHANNELS + (thread + i * THREADS) % CHANNELS, N - 1);
    scale[i] = BITS < 16 ? half_to_float(scales[channel]) : 1.0f;
    offset[i] = HAS_BIAS ? half_to_float(bias[channel]) : 0.0f;
  }
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

#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) {
    int index = thread + i * THREADS;
    int channel = blockIdx.x * CHANNELS + index % CHANNELS, row = first_row + index / CHANNELS;
    before[i] = 0;
    if (RESIDUAL && channel < N && row < rows) before[i] = ((float*)out)[(long long)row * N + channel];
  }
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
  Inputs inputs(input, first_row, rows);
  uint4 x_ahead[AHEAD][GROUP / 32][TILES];
#pragma unroll
  for (int i = 0; i < AHEAD && INPUTS_AHEAD; ++i) inputs.load(x_ahead[i], i);

  // Two sums for each output: an mma need not wait for the one before it.
  float sums[2][TILES][4] = {};
#pragma unroll
  for (int i = 0; i < SHARE; ++i) {
    uint4 w[LOADS], b[GROUP / 32][TILES];
#pragma unroll
    for (int load = 0; load < LOADS; ++load) w[load] = w_ahead[i % AHEAD][load];
    if (i + AHEAD < SHARE) weights.load(w_ahead[i % AHEAD], i + AHEAD);
    if (INPUTS_AHEAD) {
#pragma unroll
      for (int half = 0; half < GROUP / 32; ++half)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) b[half][tile] = x_ahead[i % AHEAD][half][tile];
      if (i + AHEAD < SHARE) inputs.load(x_ahead[i % AHEAD], i + AHEAD);
    } else {
      inputs.load(b, i);
    }
    if (Weights::there(i)) multiply(sums[TILES == 1 ? i % 2 : 0], w, b);
  }

#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      partial[warp][lane / 4 + i / 2 * 8][tile * 8 + t * 2 + i % 2] =
          sums[0][tile][i] + sums[1][tile][i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) {
    int index = thread + i * THREADS;
    int channel = blockIdx.x * CHANNELS + index % CHANNELS, row = first_row + index / CHANNELS;
    if (index >= CHANNELS * 8 * TILES || channel >= N || row >= rows) continue;
    float y = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other)
      y += partial[other][index % CHANNELS][index / CHANNELS];
    y = y * scale[i] + offset[i];
    if (RELU) y = fmaxf(y, 0.0f);
    long long at = (long long)row * N + channel;
    if (OUT_FLOAT)
      ((float*)out)[at] = before[i] + y;
    else
      ((u16*)out)[at] = float_to_half(y);
  }
}

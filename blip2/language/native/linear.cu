// y = x Wᵀ + b for a few rows of x, W in 16, 8 (integers or E4M3) or 4 bits: every weight is read once, at the speed
// of the memory, and goes through the tensor cores for up to 8 * TILES rows.
//
// A block owns 16 output channels. Its warps share out the inputs in groups and add up their sums
// in shared memory, in a fixed order, so a result never depends on timing.
//
// Latency is what counts beside the bytes: a launch lasts a few microseconds. So weights are always
// requested AHEAD groups before their use, and the first of them before waiting for the kernel
// before (PDL), since they do not depend on it. Rows beyond the last repeat the last one: what they
// yield is not stored, and telling them apart would cost instructions.
//
// Compiled by NVRTC with BITS, TILES, WARPS, RELU, RESIDUAL, OUT_FLOAT, HAS_BIAS and WIDTH, the
// number of inputs, defined.

#include "fragments.cuh"

#define THREADS (32 * WARPS)
#define GROUP Format<BITS>::GROUP
#define LOADS Format<BITS>::LOADS
#define GROUPS (WIDTH / GROUP)
#define SHARE ((GROUPS + WARPS - 1) / WARPS)  // groups a warp multiplies, at most
#define LIMIT (TILES > 1 || Format<BITS>::IS_FLOAT8 ? 3 : 5)
#define AHEAD (LIMIT < SHARE ? LIMIT : SHARE)
#define INPUTS_AHEAD (TILES <= 2)  // else they are many
#define OUTPUTS ((CHANNELS * 8 * TILES + THREADS - 1) / THREADS)  // a thread's, at most

__device__ inline uint4 load_once(const void* at) {  // streamed: no other block reads it
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// Where a thread finds its weights of the groups that its warp multiplies: group warp + i * WARPS.
struct Weights {
  const char *near, *far;

  __device__ Weights(const char* weight, int N) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (Format<BITS>::PLAIN) {
      int channel = blockIdx.x * CHANNELS + lane / 4, k = warp * GROUP + lane % 4 * Format<BITS>::INPUTS;
      near = weight + ((long long)min(channel, N - 1) * WIDTH + k) * (BITS / 8);
      far = weight + ((long long)min(channel + 8, N - 1) * WIDTH + k) * (BITS / 8);
    } else {
      near = far = weight + ((long long)blockIdx.x * GROUPS + warp) * 512 + lane * 16;
    }
  }

  __device__ void load(uint4* w, int i) const {
    if (!there(i)) return;
    int step = i * WARPS * (Format<BITS>::PLAIN ? GROUP * BITS / 8 : 512);
    w[0] = load_once(near + step);
    if (Format<BITS>::PLAIN) w[LOADS - 1] = load_once(far + step);
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
      int mine = min(first_row + tile * 8 + lane / 4, rows - 1);
      row[tile] = x + mine * WIDTH + warp * GROUP + lane % 4 * Format<BITS>::INPUTS;
    }
  }

  __device__ void load(uint4 (*b)[TILES], int i) const {
    if (!Weights::there(i)) return;
#pragma unroll
    for (int half = 0; half < GROUP / 32; ++half)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        b[half][tile] = *(const uint4*)(row[tile] + i * WARPS * GROUP + Format<BITS>::HALF * half);
  }
};

__device__ inline void multiply(float (*sums)[4], const uint4* w, uint4 (*b)[TILES]) {
  unpack<BITS>(w, [&](const u32* near, const u32* far, int half) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      mma(sums[tile], near[0], far[0], near[1], far[1], b[half][tile].x, b[half][tile].y);
      mma(sums[tile], near[2], far[2], near[3], far[3], b[half][tile].z, b[half][tile].w);
    }
  });
}

extern "C" __global__ void __launch_bounds__(THREADS, (TILES > 1 ? 512 : 640) / THREADS)
    linear(const u16* x, const char* weight, const void* scales, const u16* bias, void* out, int rows,
           int N) {
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
    scale[i] = scale_at<BITS>(scales, channel);
    offset[i] = HAS_BIAS ? half_to_float(bias[channel]) : 0.0f;
  }
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
  Inputs inputs(x, first_row, rows);
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

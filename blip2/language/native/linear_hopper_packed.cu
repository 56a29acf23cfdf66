// y = x Wᵀ + b for some tens of rows of x, W in 8 or 4 bits: weights are unpacked in registers, from
// where the tensor cores take them; inputs lie in shared memory.
//
// Weights and inputs are copied to places of each thread's own, which need no barrier.

#include "hopper.cuh"

#define LOADS_OF_WEIGHTS (BITS / 4)  // of 16 bytes, a thread's in a step
#define LOAD_BYTES (16 * THREADS)    // a block's
#define STAGE_BYTES (8 * TILES * STEP_BYTES)

struct Weights {
  const char* from;
  u32 own;

  __device__ Weights(const char* weight, int N, u32 places) : own(places + threadIdx.x * 16) {
    int tile = min(blockIdx.y * WARPS + threadIdx.x / 32, (N - 1) / CHANNELS);
    from = weight + ((long long)tile * STEPS * LOADS_OF_WEIGHTS * 32 + threadIdx.x % 32) * 16;
  }

  __device__ u32 place(int index, int i) const {
    return own + (index % DEPTH * LOADS_OF_WEIGHTS + i) * LOAD_BYTES;
  }

  // Step `step` of the linear, the index-th of the block.
  __device__ void fetch_step(int step, int index) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_WEIGHTS; ++i)
      fetch(place(index, i), from + (step * LOADS_OF_WEIGHTS + i) * 512);
  }

  __device__ void read_step(int index, uint4* w) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_WEIGHTS; ++i) w[i] = load_shared(place(index, i));
  }
};

// A thread's inputs are, of row e / 64 * 8 + e / 4 % 8, the 16 bytes e / 32 % 2 * 4 + e % 4 of each
// step, for each e = threadIdx.x + i * THREADS.
struct Inputs {
  const u16* x;
  int rows;
  u32 own;

  __device__ Inputs(const u16* x, int rows, u32 places)
      : x(x), rows(rows), own(places + threadIdx.x * 16) {}

  static __device__ bool there(int i) {
    return (i + 1) * THREADS <= 64 * TILES || threadIdx.x + i * THREADS < 64 * TILES;
  }

  __device__ u32 place(int index, int i) const {
    return own + (index % DEPTH * LOADS_OF_INPUTS + i) * LOAD_BYTES;
  }

  __device__ void fetch_step(int step, int index) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_INPUTS; ++i) {
      int e = threadIdx.x + i * THREADS, row = min(e / 64 * 8 + e / 4 % 8, rows - 1);
      if (there(i)) fetch(place(index, i), x + row * WIDTH + step * STEP + e / 32 % 2 * 32 + e % 4 * 8);
    }
  }

  // Lays out a step for all, as the tensor cores read it, the inputs in the order in which threads hold
  // those of the weights (fragments.cuh).
  __device__ void lay_out(int index, u32 stage) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_INPUTS; ++i) {
      if (!there(i)) continue;
      int e = threadIdx.x + i * THREADS, row = e / 64 * 8 + e / 4 % 8;
      uint4 read = load_shared(place(index, i));
      const u32* words = (const u32*)&read;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(stage + swapped(row, e / 32 % 2 * 4 + j) + e % 4 * 4),
                     "r"(words[j])
                     : "memory");
    }
  }
};

// sums += 16 inputs of 64 channels, in the registers of four warps, times those of all rows.
__device__ inline void multiply(float* c, const u32* a, u64 inputs) {
#define TEXT(columns, sums, a0, a1, a2, a3, inputs, one) \
  PRODUCT(columns, sums, "{" a0 ", " a1 ", " a2 ", " a3 "}", inputs, one, ", 0")
  asm volatile(FOR_TILES(TEXT) : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs), "r"(1));
}

// The same for a step, begun: the registers are not free before `finish`.
__device__ inline void multiply_step(float* sums, const uint4* w, u32 stage) {
  u32 a[STEP / 16][4];
#pragma unroll
  for (int group = 0; group < STEP / Format<BITS>::GROUP; ++group)
    unpack<BITS>(w + group * Format<BITS>::LOADS, [&](const u32* near, const u32* far, int half) {
      int k = (group * Format<BITS>::HALVES + half) * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        a[k + i][0] = near[2 * i], a[k + i][1] = far[2 * i], a[k + i][2] = near[2 * i + 1],
                 a[k + i][3] = far[2 * i + 1];
    });
  u64 inputs = descriptor(stage);
  begin();
#pragma unroll
  for (int k = 0; k < STEP / 16; ++k) multiply(sums, a[k], inputs + 2 * k);
  commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    linear(const u16* x, const char* weight, const u16* scales, const u16* bias, void* out, int rows,
           int N) {
  extern __shared__ __align__(1024) char shared[];
  u32 stages = (u32)__cvta_generic_to_shared(shared);
  int first = blockIdx.x * STEPS / SPLIT, last = (blockIdx.x + 1) * STEPS / SPLIT;

  u32 weight_places = stages + 2 * STAGE_BYTES;
  Weights weights(weight, N, weight_places);
  Inputs inputs(x, rows, weight_places + DEPTH * LOADS_OF_WEIGHTS * LOAD_BYTES);
#pragma unroll
  for (int i = 0; i < EARLY; ++i)
    if (first + i < last) weights.fetch_step(first + i, i);
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    if (i >= EARLY && first + i < last) weights.fetch_step(first + i, i);
    if (first + i < last) inputs.fetch_step(first + i, i);
    close_group();
  }
  wait_for_all_but<DEPTH - 1>();
  inputs.lay_out(0, stages);

  float sums[4 * TILES] = {};
#pragma unroll 2
  for (int index = 0; index < last - first; ++index) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();  // this step's inputs are there, and all have multiplied the step before
    wait_for_all_but<DEPTH - 2>();  // the next step's groups: its inputs are laid out meanwhile
    uint4 w[LOADS_OF_WEIGHTS];
    weights.read_step(index, w);
    multiply_step(sums, w, stages + index % 2 * STAGE_BYTES);
    int step = first + index;
    if (step + 1 < last) inputs.lay_out(index + 1, stages + (index + 1) % 2 * STAGE_BYTES);
    if (step + DEPTH < last) {
      weights.fetch_step(step + DEPTH, index);
      inputs.fetch_step(step + DEPTH, index);
    }
    close_group();
    finish();
  }
  store_sums(sums, shared, scales, nullptr, bias, out, rows, N);
}

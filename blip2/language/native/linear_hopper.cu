// y = x Wᵀ + b for some tens of rows of x, W in 16, 8 or 4 bits, with Hopper's own products (wgmma).
//
// With so many rows the weights are no longer all that counts: were every 16 channels to read the
// inputs for themselves, as in linear.cu, that would be several times the weights. So a block has 16
// channels for each of its warps, and copies the inputs into shared memory for all of them, STEP at
// a time. Where channels are few, a cluster of SPLIT blocks shares out their inputs and adds up its
// sums through one another's shared memory, in a fixed order: a result never depends on timing.
//
// Weights and inputs are copied to shared memory DEPTH steps before their use, the first weights
// before waiting for the kernel before (PDL). Rows beyond the last repeat the last one.
//
// Compiled by NVRTC with BITS, TILES (of 8 rows), WARPS, SPLIT, DEPTH, RELU, RESIDUAL, OUT_FLOAT,
// HAS_BIAS and WIDTH, the number of inputs, a multiple of STEP, defined.

#include "fragments.cuh"

typedef unsigned long long u64;

#define THREADS (32 * WARPS)
#define BLOCK_CHANNELS (CHANNELS * WARPS)
#define STEP 64
#define STEPS (WIDTH / STEP)
#define LOADS_OF_WEIGHTS (BITS / 4)                             // of 16 bytes, a thread's in a step
#define LOADS_OF_INPUTS ((64 * TILES + THREADS - 1) / THREADS)  // the same
#define EARLY 2                                                 // steps
#define LOAD_BYTES (16 * THREADS)                               // a block's
#define STAGE_BYTES (8 * TILES * 2 * STEP)
#define SUM_PITCH (BLOCK_CHANNELS + 4)  // of a row of sums, in floats

// A thread copies what it will read itself to places of its own in shared memory, DEPTH steps ahead.
__device__ inline void fetch(u32 place, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}

__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
__device__ inline void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

__device__ inline uint4 load_shared(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

struct Weights {
  const char *near, *far;
  u32 own;

  __device__ Weights(const char* weight, int N, u32 places) : own(places + threadIdx.x * 16) {
    int lane = threadIdx.x % 32;
    int tile = blockIdx.y * WARPS + threadIdx.x / 32;
    if (BITS == 16) {
      int channel = tile * CHANNELS + lane / 4;
      near = weight + ((long long)min(channel, N - 1) * WIDTH + lane % 4 * 8) * 2;
      far = weight + ((long long)min(channel + 8, N - 1) * WIDTH + lane % 4 * 8) * 2;
    } else {
      tile = min(tile, (N - 1) / CHANNELS);
      near = far = weight + ((long long)tile * STEPS * LOADS_OF_WEIGHTS * 32 + lane) * 16;
    }
  }

  __device__ u32 place(int index, int i) const {
    return own + (index % DEPTH * LOADS_OF_WEIGHTS + i) * LOAD_BYTES;
  }

  // Step `step` of the linear, the index-th of the block: for each 32 inputs of 16 bits those of the
  // near and of the far channel, else as packed.
  __device__ void fetch_step(int step, int index) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_WEIGHTS; ++i)
      if (BITS == 16)
        fetch(place(index, i), (i % 2 ? far : near) + step * (2 * STEP) + i / 2 * 64);
      else
        fetch(place(index, i), near + (step * LOADS_OF_WEIGHTS + i) * 512);
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

  // Lays out a step for all, as the tensor cores read it: rows of 128 bytes, whose 16-byte pieces are
  // swapped about by row, the inputs in the order in which threads hold those of the weights
  // (fragments.cuh).
  __device__ void lay_out(int index, u32 stage) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_INPUTS; ++i) {
      if (!there(i)) continue;
      int e = threadIdx.x + i * THREADS, row = e / 64 * 8 + e / 4 % 8;
      uint4 read = load_shared(place(index, i));
      const u32* words = (const u32*)&read;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(stage + row * 128 + ((e / 32 % 2 * 4 + j) ^ row % 8) * 16 + e % 4 * 4),
                     "r"(words[j])
                     : "memory");
    }
  }
};

// sums += 16 inputs of 64 channels, in the registers of four warps, times those of all rows.
__device__ inline void multiply(float* c, const u32* a, u64 inputs) {
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define WEIGHTS_AND_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs), "r"(1)
#define PRODUCT(columns, sums, weights, inputs, one) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " one ", 0;\nwgmma.mma_async.sync.aligned.m64" columns \
  "k16.f32.f16.f16 {" sums "}, {" weights "}, " inputs ", add, 1, 1, 0;\n}"
#define SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SUMS_16 SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_24 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_32 SUMS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#if TILES == 2
  asm volatile(PRODUCT("n16", SUMS_8, "%8, %9, %10, %11", "%12", "%13") : FOUR(0), FOUR(4) : WEIGHTS_AND_INPUTS);
#elif TILES == 4
  asm volatile(PRODUCT("n32", SUMS_16, "%16, %17, %18, %19", "%20", "%21")
               : FOUR(0), FOUR(4), FOUR(8), FOUR(12) : WEIGHTS_AND_INPUTS);
#elif TILES == 6
  asm volatile(PRODUCT("n48", SUMS_24, "%24, %25, %26, %27", "%28", "%29")
               : FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20) : WEIGHTS_AND_INPUTS);
#elif TILES == 8
  asm volatile(PRODUCT("n64", SUMS_32, "%32, %33, %34, %35", "%36", "%37")
               : FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20), FOUR(24), FOUR(28)
               : WEIGHTS_AND_INPUTS);
#endif
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
  // Rows of 128 bytes, swapped about (1 << 62), eight of them 1024 bytes; in units of 16 bytes.
  u64 inputs = stage >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < STEP / 16; ++k) multiply(sums, a[k], inputs + 2 * k);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ inline void finish() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Between the blocks that share channels: their shared memory is written, `last` read.
__device__ inline void meet(bool last) {
#if SPLIT > 1
  if (last)
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  if (!last) __syncthreads();
#endif
}

// Four sums in the shared memory of block `other` of the cluster.
__device__ inline float4 load_sums(u32 at, int other) {
  float4 v;
#if SPLIT > 1
  asm volatile(
      "{\n.reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(at), "r"(other));
#else
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
#endif
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    linear(const u16* x, const char* weight, const u16* scales, const u16* bias, void* out, int rows,
           int N) {
  extern __shared__ __align__(1024) char shared[];
  u32 stages = (u32)__cvta_generic_to_shared(shared);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  int rank = blockIdx.x, first = rank * STEPS / SPLIT, last = (rank + 1) * STEPS / SPLIT;

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

  // A thread's outputs are four channels of every so many rows. What they are added to is on its way
  // while the blocks meet.
  constexpr int ABREAST = 4 * THREADS / BLOCK_CHANNELS * SPLIT;  // rows at a time
  constexpr int EACH = (8 * TILES + ABREAST - 1) / ABREAST;      // of a thread
  int in_block = threadIdx.x * 4 % BLOCK_CHANNELS, channel = blockIdx.y * BLOCK_CHANNELS + in_block;
  int first_row = rank + threadIdx.x * 4 / BLOCK_CHANNELS * SPLIT;
  bool in_fours = N % 4 == 0;
  float scale[4], offset[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale[i] = BITS < 16 ? half_to_float(scales[min(channel + i, N - 1)]) : 1.0f;
    offset[i] = HAS_BIAS ? half_to_float(bias[min(channel + i, N - 1)]) : 0.0f;
  }
  float before[EACH][4] = {};
  if (RESIDUAL)
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      int row = first_row + j * ABREAST;
      const float* from = (const float*)out + (long long)row * N + channel;
      if (row >= rows || channel >= N) continue;
      if (in_fours)
        *(float4*)before[j] = *(const float4*)from;
      else
        for (int i = 0; i < 4; ++i) before[j][i] = channel + i < N ? from[i] : 0.0f;
    }
  __syncthreads();  // the inputs were read: their place may be written
  float* own = (float*)shared;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      own[(tile * 8 + t * 2 + i % 2) * SUM_PITCH + warp * CHANNELS + g + i / 2 * 8] = sums[4 * tile + i];
  meet(false);
  float4 parts[EACH][SPLIT];
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    int row = first_row + j * ABREAST;
    if (row >= rows || channel >= N) continue;  // a sum that is not used could arrive after the end
#pragma unroll
    for (int other = 0; other < SPLIT; ++other)
      parts[j][other] = load_sums(stages + (row * SUM_PITCH + in_block) * 4, other);
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    int row = first_row + j * ABREAST;
    float y[4] = {};
#pragma unroll
    for (int other = 0; other < SPLIT; ++other) {
      const float4& part = parts[j][other];
      y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = y[i] * scale[i] + offset[i];
      if (RELU) y[i] = fmaxf(y[i], 0.0f);
      y[i] += before[j][i];
    }
    if (row >= rows || channel >= N) continue;
    long long at = (long long)row * N + channel;
    if (in_fours && OUT_FLOAT) {
      *(float4*)((float*)out + at) = float4{y[0], y[1], y[2], y[3]};
    } else if (in_fours) {
      *(uint2*)((u16*)out + at) = gather(y);
    } else {
      for (int i = 0; i < 4; ++i) {
        if (channel + i >= N) break;
        if (OUT_FLOAT)
          ((float*)out)[at + i] = y[i];
        else
          ((u16*)out)[at + i] = float_to_half(y[i]);
      }
    }
  }
  meet(true);  // no block goes while others read its sums
}

// What the linears with Hopper's own products (wgmma) share: linear_hopper.cu for weights of 16 bits,
// linear_hopper_packed.cu for fewer.
//
// With some tens of rows the weights are no longer all that counts: were every 16 channels to read
// the inputs for themselves, as in linear.cu, that would be several times the weights. So a block has
// 16 channels for each of its warps, and copies the inputs into shared memory for all of them, STEP
// at a time, DEPTH steps ahead; the first weights before waiting for the kernel before (PDL). Where
// channels are few, a cluster of SPLIT blocks shares out their inputs and adds up its sums through
// one another's shared memory, in a fixed order: a result never depends on timing. Rows beyond the
// last repeat the last one.
//
// Compiled by NVRTC with BITS, TILES (of 8 rows), WARPS, SPLIT, DEPTH, RELU, RESIDUAL, OUT_FLOAT, HAS_BIAS
// and WIDTH, the number of inputs, a multiple of 64, defined; FLOAT8 where weights and inputs are E4M3.

#include "fragments.cuh"
#include "wgmma.cuh"

#define THREADS (32 * WARPS)
#define BLOCK_CHANNELS (CHANNELS * WARPS)
#define STEP_BYTES 128                                          // of a row
#define STEP (FLOAT8 ? 128 : 64)                                // inputs
#define STEPS ((WIDTH + STEP - 1) / STEP)
#define LOADS_OF_INPUTS ((64 * TILES + THREADS - 1) / THREADS)  // of 16 bytes, a thread's in a step
#define EARLY 2                                                 // steps
#define SUM_PITCH (BLOCK_CHANNELS + 4)                          // of a row of sums, in floats

__device__ inline void fetch(u32 place, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}

__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
__device__ inline void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Where the tensor cores look for 16 bytes of a row, as `descriptor` says.
__device__ inline u32 swapped(int row, int piece) { return row * STEP_BYTES + (piece ^ row % 8) * 16; }

// A product of 64 channels and all rows, 32 bytes of inputs of each, added to sums c. FOR_TILES gives `text` the
// columns, the sums and the numbers that its operands have behind those; PRODUCT makes an instruction
// of that, whose `modes` are what follows the operands' signs.
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SUMS_16 SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_24 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_32 SUMS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#if TILES == 2
#define SUMS FOUR(0), FOUR(4)
#define FOR_TILES(text) text("n16", SUMS_8, "%8", "%9", "%10", "%11", "%12", "%13")
#elif TILES == 4
#define SUMS FOUR(0), FOUR(4), FOUR(8), FOUR(12)
#define FOR_TILES(text) text("n32", SUMS_16, "%16", "%17", "%18", "%19", "%20", "%21")
#elif TILES == 6
#define SUMS FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20)
#define FOR_TILES(text) text("n48", SUMS_24, "%24", "%25", "%26", "%27", "%28", "%29")
#elif TILES == 8
#define SUMS FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20), FOUR(24), FOUR(28)
#define FOR_TILES(text) text("n64", SUMS_32, "%32", "%33", "%34", "%35", "%36", "%37")
#endif
#if FLOAT8
#define TYPES "k32.f32.e4m3.e4m3"
#else
#define TYPES "k16.f32.f16.f16"
#endif
#define PRODUCT(columns, sums, weights, inputs, one, modes) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " one ", 0;\nwgmma.mma_async.sync.aligned.m64" columns TYPES \
  " {" sums "}, " weights ", " inputs ", add, 1, 1" modes ";\n}"

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

// Scales the blocks' sums, by channel and by row where there are such scales, adds the bias and stores
// them. A thread's outputs are four channels of
// every so many rows; what they are added to is on its way while the blocks meet.
__device__ inline void store_sums(const float* sums, char* shared, const void* scales,
                                  const float* row_scales, const u16* bias, void* out, int rows, int N) {
  constexpr int ABREAST = 4 * THREADS / BLOCK_CHANNELS * SPLIT;  // rows at a time
  constexpr int EACH = (8 * TILES + ABREAST - 1) / ABREAST;      // of a thread
  int in_block = threadIdx.x * 4 % BLOCK_CHANNELS, channel = blockIdx.y * BLOCK_CHANNELS + in_block;
  int first_row = blockIdx.x + threadIdx.x * 4 / BLOCK_CHANNELS * SPLIT;
  bool in_fours = N % 4 == 0;
  float scale[4], offset[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale[i] = scale_at<BITS>(scales, min(channel + i, N - 1));
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
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      own[(tile * 8 + lane % 4 * 2 + i % 2) * SUM_PITCH + warp * CHANNELS + lane / 4 + i / 2 * 8] = sums[4 * tile + i];
  meet(false);
  float4 parts[EACH][SPLIT];
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    int row = first_row + j * ABREAST;
    if (row >= rows || channel >= N) continue;  // a sum that is not used could arrive after the end
#pragma unroll
    for (int other = 0; other < SPLIT; ++other)
      parts[j][other] = load_sums((u32)__cvta_generic_to_shared(shared) + (row * SUM_PITCH + in_block) * 4, other);
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    int row = first_row + j * ABREAST;
    float y[4] = {}, row_scale = row_scales && row < rows ? row_scales[row] : 1.0f;
#pragma unroll
    for (int other = 0; other < SPLIT; ++other) {
      const float4& part = parts[j][other];
      y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = y[i] * (scale[i] * row_scale) + offset[i];
      if (RELU) y[i] = fmaxf(y[i], 0.0f);
      y[i] += before[j][i];
    }
    if (row >= rows || channel >= N) continue;
    long long at = (long long)row * N + channel;
    if (in_fours && OUT_FLOAT) {
      *(float4*)((float*)out + at) = float4{y[0], y[1], y[2], y[3]};
    } else if (in_fours) {
      *(uint2*)((u16*)out + at) = to_halves(y);
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

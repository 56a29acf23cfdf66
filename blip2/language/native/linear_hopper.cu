// y = x Wᵀ + b for some tens of rows of x, both x and W in 16 bits or in E4M3 with a float32 scale for
// each row and channel: both go from shared memory to the tensor cores.

#include "hopper.cuh"

#define ROW_BYTES (WIDTH * BITS / 8)
#define WEIGHT_BYTES (BLOCK_CHANNELS * STEP_BYTES)
#define PLACE_BYTES (WEIGHT_BYTES + 8 * TILES * STEP_BYTES)  // of a step

#if FLOAT8
#define MODES ""
#else
#define MODES ", 0, 0"  // neither is transposed
#endif

// A step's weights, then its inputs, in the place of the index-th step of the block.
struct Steps {
  const char *weight, *x;
  int N, rows;
  u32 places;

  __device__ u32 place(int index) const { return places + index % DEPTH * PLACE_BYTES; }

  // 16 bytes of a row; zeros where the last step goes beyond its end.
  static __device__ void fetch_piece(u32 to, const char* row, int step, int piece) {
    int at = step * STEP_BYTES + piece * 16;
    if (ROW_BYTES % STEP_BYTES == 0 || at < ROW_BYTES)
      fetch(to, row + at);
    else
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 0;" ::"r"(to), "l"(row) : "memory");
  }

  __device__ void fetch_weights(int step, int index) const {
#pragma unroll
    for (int i = 0; i < BLOCK_CHANNELS * 8 / THREADS; ++i) {
      int e = threadIdx.x + i * THREADS, row = e / 8, piece = e % 8;
      long long channel = min(blockIdx.y * BLOCK_CHANNELS + row, N - 1);
      fetch_piece(place(index) + swapped(row, piece), weight + channel * ROW_BYTES, step, piece);
    }
  }

  __device__ void fetch_inputs(int step, int index) const {
#pragma unroll
    for (int i = 0; i < LOADS_OF_INPUTS; ++i) {
      int e = threadIdx.x + i * THREADS, row = e / 8, piece = e % 8;
      if (e < 64 * TILES)
        fetch_piece(place(index) + WEIGHT_BYTES + swapped(row, piece),
                    x + (long long)min(row, rows - 1) * ROW_BYTES, step, piece);
    }
  }

  // Begins a step's products; every four warps take 64 channels.
  __device__ void multiply(float* sums, int index) const {
    u64 weights = descriptor(place(index) + threadIdx.x / 128 * (64 * STEP_BYTES));
    u64 inputs = descriptor(place(index) + WEIGHT_BYTES);
    begin();
#pragma unroll
    for (int k = 0; k < STEP_BYTES / 32; ++k) multiply(sums, weights + 2 * k, inputs + 2 * k);
    commit();
  }

  static __device__ void multiply(float* c, u64 weights, u64 inputs) {
#define TEXT(columns, sums, weights, inputs, one, ...) PRODUCT(columns, sums, weights, inputs, one, MODES)
    asm volatile(FOR_TILES(TEXT) : SUMS : "l"(weights), "l"(inputs), "r"(1));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    linear(const char* x, const char* weight, const void* scales, const u16* bias, void* out, int rows,
           int N, const float* row_scales) {
  extern __shared__ __align__(1024) char shared[];
  int first = blockIdx.x * STEPS / SPLIT, last = (blockIdx.x + 1) * STEPS / SPLIT;
  Steps steps{weight, x, N, rows, (u32)__cvta_generic_to_shared(shared)};
#pragma unroll
  for (int i = 0; i < EARLY; ++i)
    if (first + i < last) steps.fetch_weights(first + i, i);
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int i = 0; i < DEPTH - 1; ++i) {
    if (i >= EARLY && first + i < last) steps.fetch_weights(first + i, i);
    if (first + i < last) steps.fetch_inputs(first + i, i);
    close_group();
  }

  float sums[4 * TILES] = {};
#pragma unroll 1
  for (int index = 0; index < last - first; ++index) {
    wait_for_all_but<DEPTH - 2>();
    finish();  // the step before: its place may be written once all are here
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    steps.multiply(sums, index);
    int ahead = index + DEPTH - 1;
    if (first + ahead < last) {
      steps.fetch_weights(first + ahead, ahead);
      steps.fetch_inputs(first + ahead, ahead);
    }
    close_group();
  }
  finish();
  store_sums(sums, shared, scales, row_scales, bias, out, rows, N);
}

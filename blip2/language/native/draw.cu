// A token for each row, drawn from what temperature, top_k and top_p leave of its logits' distribution.
//
// A block has one row, and each of its threads ELEMENTS logits side by side: HELD of them in registers,
// the others in shared memory. Nothing is sorted. The least of the top k logits, and the least of the
// probabilities that top_p leaves, are found bit by bit: whether there are as many, or as much, from a
// guess on. Equal ones stay or go together.
//
// Compiled by NVRTC with ELEMENTS and HELD defined.

typedef unsigned int u32;

#define THREADS 1024
#define WARPS (THREADS / 32)
#define NONE __int_as_float(0xff800000)  // the logit of no token
#define ONE 0x3f800000u  // the bits of 1.0f, which is the likeliest token's, as the largest is divided out

// The sum of x over the block, in every thread; alternating between two places saves a barrier.
__device__ inline double sum(double x, double (*parts)[WARPS], int& turn) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) parts[turn][threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[turn][threadIdx.x % 32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  turn ^= 1;
  return x;
}

// Numbers in the order of floats.
__device__ inline u32 key_of(float x) {
  u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Values {
  float held[HELD];
  float* rest;

  template <class Function>
  __device__ void each(Function function) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) function(held[i], i);
    for (int i = HELD; i < ELEMENTS; ++i) function(rest[(i - HELD) * THREADS + threadIdx.x], i);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    draw(const float* scores, const double* settings, const double* drawn, long long* tokens, int vocab) {
  extern __shared__ float shared[];
  __shared__ double parts[2][WARPS], ends[THREADS];
  int turn = 0, first = threadIdx.x * ELEMENTS;
  Values values;
  values.rest = shared;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const float* row = scores + (long long)blockIdx.x * vocab;
  const double* setting = settings + 4 * blockIdx.x;
  float temperature = setting[0], dropped = setting[1], highest = NONE;
  double top_k = setting[3];
  values.each([&](float& x, int i) {
    x = first + i < vocab ? row[first + i] / temperature : NONE;
    highest = fmaxf(highest, x);
  });
#pragma unroll
  for (int offset = 16; offset; offset /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, offset));
  if (threadIdx.x % 32 == 0) parts[1][threadIdx.x / 32] = highest;
  __syncthreads();
  highest = parts[1][threadIdx.x % 32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, offset));

  u32 bound = 0;
  if (top_k < vocab)
    for (u32 bit = 1u << 31; bit; bit /= 2) {
      int count = 0;
      values.each([&](float& x, int) { count += key_of(x) >= (bound | bit); });
      if (sum(count, parts, turn) >= top_k) bound |= bit;
    }
  float mine = 0;
  values.each([&](float& x, int) {
    x = key_of(x) >= bound ? exp2f((x - highest) * 1.44269504f) : 0;
    mine += x;
  });

  if (dropped > 0) {
    double most = dropped * sum(mine, parts, turn);
    bound = 0;
    for (u32 bit = 1u << 29; bit; bit /= 2) {
      float below = 0;
      values.each([&](float& x, int) { below += __float_as_uint(x) < (bound | bit) ? x : 0; });
      if (sum(below, parts, turn) <= most) bound |= bit;
    }
    bound = min(bound, ONE);
    values.each([&](float& x, int) { x = __float_as_uint(x) >= bound ? x : 0; });
  }

  // Of the thread's own, of the threads of its warp before it, then of the warps before that.
  double own = 0;
  values.each([&](float& x, int) { own += x; });
  double end = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    double before = __shfl_up_sync(~0u, end, offset);
    if (threadIdx.x % 32 >= offset) end += before;
  }
  if (threadIdx.x % 32 == 31) parts[turn][threadIdx.x / 32] = end;
  __syncthreads();
  for (int warp = 0; warp < threadIdx.x / 32; ++warp) end += parts[turn][warp];
  ends[threadIdx.x] = end;
  turn ^= 1;
  __syncthreads();
  double total = ends[THREADS - 1], target = drawn[blockIdx.x] * total;
  // A number that was rounded to 1 draws the last token that is left.
  int chosen = sum(end <= target && end < total, parts, turn);
  if (threadIdx.x != min(chosen, THREADS - 1)) return;
  double reached = chosen ? ends[chosen - 1] : 0;
  int token = first, is_found = 0;  // NaN is never more than the target
  values.each([&](float& x, int i) {
    reached += x;
    if (is_found || !(x > 0)) return;
    token = first + i;
    is_found = reached > target;
  });
  tokens[blockIdx.x] = min(token, vocab - 1);
}

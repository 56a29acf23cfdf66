// The residual stream of span.cu, to which rows' parts of dense's and proj's sums are added, and its LayerNorm.

#pragma once

#include "span_shapes.cuh"

// By the multiplying warps: the residual stream, x += bias + parts, and its LayerNorm.
struct Stream {
  static constexpr int THREADS = 32 * MULTIPLIERS;
  static constexpr int OWN = rounded_up(WIDTH, 4 * THREADS);  // four columns, of a thread
  static_assert(OWN * SPLIT <= 20, "registers do not suffice for a row's parts");

  float* x;
  const float* parts;  // SPLIT x ROWS x WIDTH
  u16* normed;
  int rows;
  float eps;
  float* scratch;

  static __device__ int column(int i) { return (i * THREADS + threadIdx.x) * 4; }

  // They are rarely in the L2 cache.
  static __device__ void prefetch(const u16* row) {
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (column(i) < WIDTH) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + column(i)));
  }

  // `counter` says when the parts are written; `told` how many rows' norms are.
  __device__ void run(const u16* bias, const u16* weight, const u16* shift, const u32* counter, u32 times, u32* told) const {
#pragma unroll 1
    for (int row = blockIdx.x; row < rows; row += BLOCKS) {
      float values[OWN][4];
      uint2 scale[OWN], offset[OWN];
      float* own = x + row * WIDTH;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        if (column(i) >= WIDTH) continue;
        float added[4];
        to_floats(*(const uint2*)(bias + column(i)), added);
        scale[i] = *(const uint2*)(weight + column(i)), offset[i] = *(const uint2*)(shift + column(i));
        float4 before = *(const float4*)(own + column(i));
        values[i][0] = before.x + added[0], values[i][1] = before.y + added[1];
        values[i][2] = before.z + added[2], values[i][3] = before.w + added[3];
      }
      if (threadIdx.x % 32 == 0) wait_until_told(counter, times);
      __syncwarp();
      add_parts(values, row);
      float total = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        if (column(i) >= WIDTH) continue;
        *(float4*)(own + column(i)) = float4{values[i][0], values[i][1], values[i][2], values[i][3]};
#pragma unroll
        for (int j = 0; j < 4; ++j) total += values[i][j];
      }
      float mean = sum(total) / WIDTH;
#pragma unroll
      for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (column(i) < WIDTH) values[i][j] -= mean, squares += values[i][j] * values[i][j];
      float factor = rsqrtf(sum(squares) / WIDTH + eps);
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        if (column(i) >= WIDTH) continue;
        float factors[4], added[4];
        to_floats(scale[i], factors), to_floats(offset[i], added);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i][j] = values[i][j] * factor * factors[j] + added[j];
        *(uint2*)(normed + row * WIDTH + column(i)) = to_halves(values[i]);
      }
      tell(told);
    }
  }

  __device__ void add_parts(float (*values)[4], int row) const {
    float4 read[SPLIT][OWN];
#pragma unroll
    for (int part = 0; part < SPLIT; ++part)
#pragma unroll
      for (int i = 0; i < OWN; ++i)
        if (column(i) < WIDTH) read[part][i] = load(parts + (part * ROWS + row) * WIDTH + column(i));
#pragma unroll
    for (int part = 0; part < SPLIT; ++part)
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        if (column(i) >= WIDTH) continue;
        const float4& y = read[part][i];
        values[i][0] += y.x, values[i][1] += y.y, values[i][2] += y.z, values[i][3] += y.w;
      }
  }

  static __device__ float4 load(const float* at) {  // from the L2 cache, where other blocks' writes are
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
  }

  __device__ float sum(float value) const {
    static_assert(MULTIPLIERS == 4, "four warps' sums are added up");
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    sync_multipliers();  // what was there has been read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    sync_multipliers();
    return scratch[0] + scratch[1] + scratch[2] + scratch[3];
  }
};

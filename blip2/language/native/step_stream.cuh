// The residual stream and its LayerNorm. Each block of step.cu has the whole of it, in its threads'
// registers: a thread keeps OWN fours of consecutive numbers.

#pragma once

#include "step_inputs.cuh"

#define OWN ((WIDTH / 4 + THREADS - 1) / THREADS)

struct Fours {  // a thread's, of three vectors as wide as the residual stream, in float16
  uint2 weight[OWN], bias[OWN], added[OWN];
};

__device__ inline bool has(int i) { return threadIdx.x + i * THREADS < WIDTH / 4; }  // whether an i-th four

__device__ inline int own(int i) { return 4 * rotated<WIDTH / 4>(threadIdx.x + i * THREADS); }

__device__ inline Fours fours(const Norm& norm, const u16* added) {
  Fours f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!has(i)) continue;
    f.weight[i] = *(const uint2*)(norm.weight + own(i));
    f.bias[i] = *(const uint2*)(norm.bias + own(i));
    f.added[i] = added ? *(const uint2*)(added + own(i)) : uint2{0, 0};
  }
  return f;
}

struct Stream {  // the residual stream, each thread's fours of it
  float x[OWN][4];

  // Adds what dense or proj made: the sum of its slots, and its bias.
  __device__ void add(const float* slots, u32 mark, const Fours& f) {
    uint4 parts[OWN * SLOTS];
    read_marked(
        parts, mark, [](int i) { return has(i / SLOTS); },
        [&](int i) { return slots + i % SLOTS * WIDTH + own(i / SLOTS); });
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      if (!has(i)) continue;
      float sums[4];
      to_floats(f.added[i], sums);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const uint4& part = parts[i * SLOTS + s];
        sums[0] += __uint_as_float(part.x), sums[1] += __uint_as_float(part.y);
        sums[2] += __uint_as_float(part.z), sums[3] += __uint_as_float(part.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] += sums[j];
    }
  }

  // Lays its LayerNorm out as inputs. Each warp finds its own mean and the squares about that; the
  // mean and the variance of all follow from those, so that warps wait for one another once, not twice.
  __device__ void normalise(const Fours& f, u16* input, float2* scratch) const {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (has(i))
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += x[i][j];
    sum = warp_sum(sum);
    float mean = __fdividef(sum, max(1, count(threadIdx.x / 32)));
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (has(i))
#pragma unroll
        for (int j = 0; j < 4; ++j) squares += (x[i][j] - mean) * (x[i][j] - mean);
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = {sum, squares};
    sync();
    float2 of_warp[WARPS];
    sum = squares = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      of_warp[warp] = scratch[warp];
      sum += of_warp[warp].x;
    }
    mean = sum / WIDTH;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      float away = of_warp[warp].x - count(warp) * mean;  // count times its mean's distance
      squares += of_warp[warp].y + __fdividef(away * away, max(1, count(warp)));
    }
    float scale = rsqrtf(squares / WIDTH + 1e-5f);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      if (!has(i)) continue;
      float weight[4], bias[4], normed[4];
      to_floats(f.weight[i], weight);
      to_floats(f.bias[i], bias);
#pragma unroll
      for (int j = 0; j < 4; ++j) normed[j] = (x[i][j] - mean) * scale * weight[j] + bias[j];
      *(uint2*)(input + own(i)) = to_halves(normed);
    }
    sync();
  }

  // How many numbers of the stream a warp has.
  static __device__ constexpr int count(int warp) {
    if (WIDTH / 4 % THREADS == 0) return WIDTH / WARPS;
    int fours = 0;
    for (int i = 0; i < OWN; ++i) {
      int left = WIDTH / 4 - i * THREADS - warp * 32;
      fours += left < 0 ? 0 : left < 32 ? left : 32;
    }
    return 4 * fours;
  }
};

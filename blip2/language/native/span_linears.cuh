// The linears of span.cu: products through the tensor cores, and what becomes of the sums.

#pragma once

#include "span_shapes.cuh"
#include "wgmma_products.cuh"

// By the multiplying warps.
struct Products {
  InputsRing inputs;
#if BITS == 16
  WeightsRing weights;
#else
  UnpackedRing weights;
#endif
  int rows;

  // Calls store(row, channel, split, two sums), scaled and with the bias, if any, for what there is.
  template <typename S, bool BIASED, typename Store>
  __device__ void run(const u16* scales, const u16* bias, Store store) {
    int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 + lane / 4;
    S::for_own([&](int tile, int split, int first, int last) {
      int first_channel = tile * S::TILE + lane % 4 * 2;
      u32 scale[S::TILE / 8], offset[S::TILE / 8];
#pragma unroll
      for (int i = 0; i < S::TILE / 8; ++i) {
        int channel = min(first_channel + 8 * i, S::CHANNELS_ALL - 2);
        if (BITS < 16) scale[i] = *(const u32*)(scales + channel);
        if (BIASED) offset[i] = *(const u32*)(bias + channel);
      }
      float sums[S::TILE / 2];
      multiply<S>(sums, first, last);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        int row = first_row + 8 * k;
        if (row >= rows) continue;
#pragma unroll
        for (int i = 0; i < S::TILE / 8; ++i) {
          int channel = first_channel + 8 * i;
          float2 y{sums[4 * i + 2 * k], sums[4 * i + 2 * k + 1]};
          if (BITS < 16) y.x *= half_to_float(scale[i] & 0xffff), y.y *= half_to_float(scale[i] >> 16);
          if (BIASED) y.x += half_to_float(offset[i] & 0xffff), y.y += half_to_float(offset[i] >> 16);
          if (channel < S::CHANNELS_ALL) store(row, channel, split, y);
        }
      }
    });
  }

  // A thread's sums: at 4 i + 2 k + j of channel 8 i + lane % 4 * 2 + j of the tile, row 16 warp + lane / 4 + 8 k.
  template <typename S>
  __device__ void multiply(float* sums, int first, int last) {
    InputsRing read_inputs = inputs;
    auto read_weights = weights;
    auto release = [&] {
      arrive_once(read_inputs.emptied()), read_inputs.next();
#pragma unroll
      for (int half = 0; half < 2; ++half) arrive_once(read_weights.emptied()), read_weights.next();
    };
    begin_step<S>(sums, false);
#pragma unroll 1
    for (int input = first + STEP; input < last; input += STEP) {
      begin_step<S>(sums, true);
      finish<1>();
      release();
    }
    finish();
    release();
  }

  // With `more`, the products are added to the sums.
  template <typename S>
  __device__ void begin_step(float* sums, bool more) {
    inputs.wait_filled();
    u64 x = descriptor(inputs.at()), w[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weights.wait_filled();
      w[half] = descriptor(weights.at());
      weights.next();
    }
    begin();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        Product<S::TILE>::add(sums, x + half * (INPUT_HALF_BYTES / 16) + 2 * k, w[half] + 2 * k, more || half + k > 0);
    commit();
    inputs.next();
  }
};

// Weights and inputs of span.cu on their way to shared memory, and packed weights unpacked there.

#pragma once

#include "fragments.cuh"
#include "span_shapes.cuh"

// By a warp: a linear's weights, of which UNDER_WAY stages are on their way at most. With more, what the blocks write
// for one another would wait behind them. Packed ones, of which there is time for, are held back altogether meanwhile.
struct WeightCopies {
  WeightsRing ring, before;
  const volatile u32* exchanging;
  int begun = 0;

  template <typename S>
  __device__ void run(const Weights& weights) {
    S::for_own([&](int tile, int, int first, int last) {
#pragma unroll 1
      for (int input = first; input < last; input += STAGE_INPUTS) {
        if (begun++ >= UNDER_WAY) before.wait_filled(), before.next();
        ring.wait_emptied();
        while (BITS < 16 && *exchanging) {
        }
        copy_stage<S>(weights, tile, input, last);
        ring.next();
      }
    });
  }

  template <typename S>
  __device__ void copy_stage(const Weights& weights, int tile, int input, int last) const {
    int lane = threadIdx.x % 32;
#if BITS == 16
    if (lane > 0) return;
    arrive_before(ring.filled(), S::TILE * 128);
    copy_box(ring.at(), weights, tile * S::TILE, input, ring.filled());
#else
    int bytes = min(STAGE_INPUTS, last - input) * (2 * BITS);  // of 16 channels
    if (lane == 0) arrive_before(ring.filled(), S::TILE / 16 * bytes);
    __syncwarp();
    if (lane >= S::TILE / 16) return;
    long long piece = min(tile * (S::TILE / 16) + lane, S::CHANNELS_ALL / 16 - 1);
    copy(ring.at() + lane * PIECE_BYTES, weights + (piece * S::ALL_INPUTS + input) * (2 * BITS), bytes, ring.filled());
#endif
  }
};

// By a thread: a linear's inputs, all of which are there when `counter`, if any, has counted so far.
struct InputCopies {
  InputsRing ring;
  volatile u32* exchanging;

  template <typename S>
  __device__ void run(const TensorMap& x, const u32* counter, u32 times) {
    S::for_own([&](int, int, int first, int last) {
      if (counter) {
        wait_until_told(counter, times);
        asm volatile("fence.proxy.async.global;" ::: "memory");  // copies do not follow an acquire by themselves
        *exchanging = false;
      }
#pragma unroll 1
      for (int input = first; input < last; input += STEP) {
        ring.wait_emptied();
        arrive_before(ring.filled(), 2 * INPUT_HALF_BYTES);
        copy_box(ring.at(), x, 0, input, ring.filled());
        copy_box(ring.at() + INPUT_HALF_BYTES, x, 0, input + STEP / 2, ring.filled());
        ring.next();
      }
    });
  }
};

#if BITS < 16
// By TEAMS of warps: packed weights to float16, half a step at a time, as copy_box would have left them. It takes long
// until the tensor cores may read what was written, so several teams do it.
struct Unpacking {
  WeightsRing from;
  UnpackedRing to;
  int halves = 0;  // so far

  template <typename S>
  __device__ void run() {
    int warp = threadIdx.x / 32 - MULTIPLIERS;
    S::for_own([&](int, int, int first, int last) {
#pragma unroll 1
      for (int input = first; input < last; input += STAGE_INPUTS) {
        from.wait_filled();
#pragma unroll 1
        for (int half = input; half < min(input + STAGE_INPUTS, last); half += STEP / 2) {
          if (halves++ % TEAMS == warp / TEAM) {
            to.wait_emptied();
            for (int piece = warp % TEAM; piece < S::TILE / 16; piece += TEAM) unpack_piece(piece, half - input);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            arrive_once(to.filled());
          }
          to.next();
        }
        __syncwarp();
        arrive_once(from.emptied());
        from.next();
      }
    });
  }

  // 64 inputs of 16 channels.
  __device__ void unpack_piece(int piece, int input) const {
    int lane = threadIdx.x % 32, row = lane / 4;
    u32 packed = from.at() + piece * PIECE_BYTES + input * (2 * BITS) + lane * 16;
    u32 at = to.at() + piece * (16 * 128) + row * 128;
    uint4 w[BITS / 4];
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) w[i] = load_shared(packed + i * 512);
#pragma unroll
    for (int group = 0; group < STEP / 2 / Format<BITS>::GROUP; ++group)
      unpack<BITS>(w + group, [&](const u32* near, const u32* far, int part) {
        u32 column = ((group * Format<BITS>::HALVES + part) * 4 + lane % 4 ^ row) * 16;
        store_shared(at + column, near);
        store_shared(at + 8 * 128 + column, far);
      });
  }

  static __device__ void store_shared(u32 at, const u32* words) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  }
};
#endif

// Which block of span.cu has which part of a linear, where what lies in shared memory, and how warps and blocks
// wait for one another.

#pragma once

#include "hopper_copies.cuh"

#define ROWS 64
#define STEP 128                                     // inputs, in two halves of 128 bytes
#define MULTIPLIERS 4                                // warps
#define TEAM 5                                       // unpacking warps
#define TEAMS (BITS == 16 ? 0 : 3)                   // that take halves of steps by turns
#define WARPS (TEAMS ? (MULTIPLIERS + TEAMS * TEAM + 2 + 3) / 4 * 4 : MULTIPLIERS + 2)  // two copy; setmaxnreg asks for fours
#define STAGE_INPUTS (1024 / BITS)                    // of a stage of weights

__host__ __device__ constexpr int larger(int a, int b) { return a < b ? b : a; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int rounded_up(int a, int b) { return (a + b - 1) / b; }

constexpr int MOST_CHANNELS = larger(larger(DENSE_TILE, FC_TILE), larger(PROJ_TILE, QKV_TILE));
constexpr int STAGE_BYTES = MOST_CHANNELS * 128;  // of weights
[[maybe_unused]] constexpr int PIECE_BYTES = 16 * 128;  // of 16 channels of them
constexpr int HALF_BYTES = MOST_CHANNELS * 128, INPUT_HALF_BYTES = ROWS * 128;
constexpr int WEIGHTS = 0, INPUTS = WEIGHTS_DEPTH * STAGE_BYTES, UNPACKED = INPUTS + INPUTS_DEPTH * 2 * INPUT_HALF_BYTES;
constexpr int BARRIERS = UNPACKED + UNPACKED_DEPTH * HALF_BYTES;  // of each place, when it is filled and when emptied
constexpr int SCRATCH = BARRIERS + 16 * (WEIGHTS_DEPTH + INPUTS_DEPTH + UNPACKED_DEPTH);
constexpr int EXCHANGING = SCRATCH + 16;
static_assert(EXCHANGING + 16 <= SHARED, "shared memory is too small");
static_assert(0 < UNDER_WAY && UNDER_WAY <= WEIGHTS_DEPTH, "more copies are to be under way than there are stages");

#if BITS == 16
typedef TensorMap Weights;  // boxes of a tile's rows
#else
typedef const char* Weights;
#endif

template <int INPUTS_, int CHANNELS_, int TILE_, int SPLIT_>
struct Shape {
  static constexpr int ALL_INPUTS = INPUTS_, CHANNELS_ALL = CHANNELS_, TILE = TILE_;
  static constexpr int STEPS = ALL_INPUTS / STEP;
  static constexpr int TILES = rounded_up(CHANNELS_ALL, TILE), UNITS = TILES * SPLIT_;  // what blocks share out
  static constexpr int SHARERS = smaller(UNITS, BLOCKS);                              // blocks, the first ones
  static_assert(TILE % 16 == 0 && CHANNELS_ALL % 16 == 0 && ALL_INPUTS % STEP == 0 && SPLIT_ <= STEPS, "a linear's shape");

  // Calls each(tile, split, first input, the one behind the last) for what is this block's.
  template <typename Each>
  static __device__ void for_own(Each each) {
#pragma unroll 1
    for (int unit = blockIdx.x; unit < UNITS; unit += BLOCKS) {
      int split = unit / TILES;
      each(unit % TILES, split, split * STEPS / SPLIT_ * STEP, (split + 1) * STEPS / SPLIT_ * STEP);
    }
  }
};

using Dense = Shape<WIDTH, WIDTH, DENSE_TILE, SPLIT>;
using Fc = Shape<WIDTH, FFN, FC_TILE, 1>;
using Proj = Shape<FFN, WIDTH, PROJ_TILE, SPLIT>;
using Qkv = Shape<WIDTH, 3 * WIDTH, QKV_TILE, 1>;

// Where in a ring of places in shared memory a warp is.
template <int DEPTH, int FIRST, int BYTES>
struct Ring {
  u32 shared;
  int place = 0, phase = 0;

  __device__ u32 at() const { return shared + FIRST + place * BYTES; }
  __device__ u32 filled() const {
    constexpr int BEFORE = FIRST == WEIGHTS ? 0 : FIRST == INPUTS ? WEIGHTS_DEPTH : WEIGHTS_DEPTH + INPUTS_DEPTH;
    return shared + BARRIERS + 16 * (BEFORE + place);
  }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ void wait_filled() const { wait_for(filled(), phase); }
  __device__ void wait_emptied() const { wait_for(emptied(), phase ^ 1); }
  __device__ void next() {
    if (++place == DEPTH) place = 0, phase ^= 1;
  }

  __device__ void init(int fillers, int readers) {
    for (place = 0; place < DEPTH; ++place) init_barrier(filled(), fillers), init_barrier(emptied(), readers);
  }
};

using WeightsRing = Ring<WEIGHTS_DEPTH, WEIGHTS, STAGE_BYTES>;
using InputsRing = Ring<INPUTS_DEPTH, INPUTS, 2 * INPUT_HALF_BYTES>;
using UnpackedRing = Ring<UNPACKED_DEPTH, UNPACKED, HALF_BYTES>;

__device__ inline void sync_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * MULTIPLIERS) : "memory"); }

// By the multiplying warps, which have written something for others.
__device__ inline void tell(u32* counter) {
  sync_multipliers();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// By one thread, before it reads what others have written.
__device__ inline void wait_until_told(const u32* counter, u32 times) {
  u32 count;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  while ((int)(count - times) < 0);
}

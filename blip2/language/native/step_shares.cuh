// Which block of step.cu has which part of a linear, and what has to hold of that.
//
// A linear's tiles of 16 channels are dealt out to the blocks, and the inputs of a tile to a block's
// warps. Dense and proj have few tiles for the number of blocks, so that several blocks may share one:
// each leaves its part of the sum in a slot of its own, and whoever reads adds up the slots.

#pragma once

#include "step_model.cuh"

#define THREADS (32 * WARPS)

enum { QKV, DENSE, FC, PROJ, HEAD };

__host__ __device__ constexpr int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

template <int WHICH>
struct Shape {
  static constexpr int bits = WHICH == HEAD ? HEAD_BITS : BITS;
  static constexpr int K = WHICH == PROJ ? FFN : WIDTH;
  static constexpr int N = WHICH == QKV ? 3 * WIDTH : WHICH == FC ? FFN : WHICH == HEAD ? VOCAB : WIDTH;
  static constexpr int TILES = (N + CHANNELS - 1) / CHANNELS;
  // A slab is what a block multiplies at a time: 64 inputs for each warp, of one tile.
  static constexpr int SLABS = K / 64 / WARPS;  // of a tile
  static constexpr int LOADS = bits / 4;        // of 16 bytes, a thread's
  static constexpr bool PLAIN = Format<bits>::PLAIN;  // rows of a weight as PyTorch has them
  // Slabs copied at a time, of one tile.
  static constexpr int GANG = bits == 16 ? 1 : common_divisor(STAGE / bits, SLABS);
  // Where PLAIN: bytes of a slab's row, behind which that of the gang's next slab lies; then such a gap
  // that rows are 64 bytes apart in banks.
  static constexpr int ROW = WARPS * 8 * bits;
  static constexpr int PITCH = GANG * ROW + (192 - GANG * ROW % 128) % 128;
  static constexpr int SLAB = PLAIN ? ROW : WARPS * 128 * bits;  // bytes from a slab to the gang's next
  static constexpr bool SPLIT = WHICH == DENSE || WHICH == PROJ;
  static constexpr int DEALT = SPLIT ? TILES * SLABS : TILES;
  static constexpr int SHARERS = DEALT < BLOCKS ? DEALT : BLOCKS;

  // Where the share of a block <= SHARERS begins, in what is dealt out: tiles, or slabs of dense and proj.
  static __host__ __device__ constexpr int first_dealt(int block) { return block * DEALT / SHARERS; }

  // The first slab of any block's share; that of the next block is where the share ends.
  static __device__ int first_slab(int block) {
    int dealt = first_dealt(min(block, SHARERS));
    return SPLIT ? dealt : dealt * SLABS;
  }

  // The block to whose share a slab of dense or proj belongs.
  static __host__ __device__ constexpr int block_of(int slab) { return ((slab + 1) * SHARERS - 1) / DEALT; }
};

constexpr int CHUNK = THREADS / CHANNELS < 8 ? THREADS / CHANNELS : 8;  // tiles summed up at a time

// What the kernel rests on; docs/step.md says why.

// For dense and proj: how many blocks share a tile, and how many tiles a block has a part of.
template <int WHICH>
__host__ __device__ constexpr int most_blocks_of_a_tile() {
  using S = Shape<WHICH>;
  int most = 0;
  for (int tile = 0; tile < S::TILES; ++tile) {
    int blocks = S::block_of((tile + 1) * S::SLABS - 1) - S::block_of(tile * S::SLABS) + 1;
    most = most < blocks ? blocks : most;
  }
  return most;
}

template <int WHICH>
__host__ __device__ constexpr int most_tiles_of_a_block() {
  using S = Shape<WHICH>;
  int most = 0;
  for (int block = 0; block < S::SHARERS; ++block) {
    int tiles = (S::first_dealt(block + 1) - 1) / S::SLABS - S::first_dealt(block) / S::SLABS + 1;
    most = most < tiles ? tiles : most;
  }
  return most;
}

static_assert(LAYERS > 0, "there is no layer");
static_assert(WIDTH % (64 * WARPS) == 0 && FFN % (64 * WARPS) == 0, "warps do not share the inputs evenly");
static_assert(WIDTH % HEADS == 0, "heads do not share the width evenly");
static_assert(HEAD_BITS < 16 || VOCAB % CHANNELS == 0, "the last tile of a head in 16 bits is not full");
static_assert(BLOCKS <= Shape<QKV>::TILES, "a block has no share of qkv");
static_assert(BLOCKS <= Shape<FC>::TILES, "a block has no share of fc");
// Both write all SLOTS each time, as they take turns in them: in a slot that dense left out, readers of
// proj would find proj's of the layer before, which has the very mark they wait for.
static_assert(most_blocks_of_a_tile<DENSE>() <= SLOTS, "dense: more blocks share a tile than there are slots");
static_assert(most_blocks_of_a_tile<PROJ>() <= SLOTS, "proj: more blocks share a tile than there are slots");
static_assert(most_tiles_of_a_block<DENSE>() <= CHUNK, "dense: a block has more tiles than it sums up");
static_assert(most_tiles_of_a_block<PROJ>() <= CHUNK, "proj: a block has more tiles than it sums up");

// y = x Wᵀ for many rows of x, W in 8 or 4 bits, on a Hopper.
//
// The tensor cores take 64 channels as M, from registers of four warps, where a weight is unpacked once for ROWS
// rows; these are N, and lie in shared memory. WARPGROUPS of four warps, each with its channels, share a block's rows.
// A warp of its own copies weights and rows up to DEPTH steps ahead, also those of what the block computes next.
//
// The tensor cores want other inputs of a thread than packing.py gives it. So x has its inputs in the weights' order,
// where that costs nothing (INPUTS_ORDERED): at 16 k + 8 i + 2 t + j of each 32 lies input 8 t + 4 k + 2 i + j. Else
// four threads exchange their weights. Behind ReLU y is written in that order, for the next linear.
//
// Where channels are few, `splits` blocks share out their inputs and write PARTS of the sums in float32, which whoever
// normalises them next adds up, always in the same order: no result depends on timing.
//
// Compiled by NVRTC with BITS, ROWS, WARPGROUPS, DEPTH, SHARED, INPUTS_ORDERED, PARTS and RELU defined; many_rows.py
// says how they are chosen.

#include "fragments.cuh"
#include "hopper_copies.cuh"
#include "wgmma_products.cuh"
#include "wgmma_sums.cuh"

#define STEP 64  // inputs: 128 bytes of a row

constexpr int TILE = 64 * WARPGROUPS, PIECES = TILE / CHANNELS;
constexpr int PIECE_BYTES = STEP * CHANNELS * BITS / 8;
constexpr int INPUT_BYTES = ROWS * 128, STAGE_BYTES = INPUT_BYTES + PIECES * PIECE_BYTES;
constexpr int BARRIERS = DEPTH * STAGE_BYTES;  // of each stage, when it is filled and when emptied
// With two groups that multiply, registers go to them from the warp that copies and three idle ones beside it.
constexpr bool MOVES_REGISTERS = WARPGROUPS > 1;
constexpr int THREADS = 128 * WARPGROUPS + (MOVES_REGISTERS ? 128 : 32);
static_assert(STAGE_BYTES % 1024 == 0, "boxes begin at multiples of 1024");
static_assert(BARRIERS + 16 * DEPTH <= SHARED, "shared memory is too small");

// Where in the ring of stages a warp is.
struct Ring {
  u32 shared;
  int stage = 0, phase = 0;

  __device__ u32 inputs() const { return shared + stage * STAGE_BYTES; }
  __device__ u32 weights() const { return inputs() + INPUT_BYTES; }
  __device__ u32 filled() const { return shared + BARRIERS + 16 * stage; }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ void wait_filled() const { wait_for(filled(), phase); }
  __device__ void wait_emptied() const { wait_for(emptied(), phase ^ 1); }
  __device__ void next() {
    if (++stage == DEPTH) stage = 0, phase ^= 1;
  }
};

// What blocks share out: tiles of channels and of rows, and parts of the inputs.
struct Shape {
  int inputs, channels, rows, splits;

  // Calls each(first channel, first row, split, first step, steps) for what is this block's; steps are even.
  template <typename Each>
  __device__ void for_own(Each each) const {
    int row_tiles = (rows + ROWS - 1) / ROWS, tiles = (channels + TILE - 1) / TILE * row_tiles;
    int pairs_of_steps = inputs / STEP / 2;
#pragma unroll 1
    for (int unit = blockIdx.x; unit < tiles * splits; unit += gridDim.x) {
      int split = unit / tiles, tile = unit % tiles;
      int first = split * pairs_of_steps / splits * 2, last = (split + 1) * pairs_of_steps / splits * 2;
      each(tile / row_tiles * TILE, tile % row_tiles * ROWS, split, first, last - first);
    }
  }
};

// By a thread: all that the block computes with. The first weights do not wait for the kernel before.
struct Copies {
  const TensorMap& x;
  const TensorMap& weight;
  Shape shape;
  Ring ring;

  __device__ void run() {
    int early = 0;
    prefetch(x), prefetch(weight);
    shape.for_own([&](int channel, int row, int, int first, int steps) {
      int step = first, end = first + steps;
      if (early == 0) {
        early = min(DEPTH, steps);
        Ring behind = ring;
        for (; step < first + early; ++step) copy_weights(ring, channel, step), ring.next();
        asm volatile("griddepcontrol.wait;" ::: "memory");
        for (step = first; step < first + early; ++step) copy_inputs(behind, row, step), behind.next();
      }
#pragma unroll 1
      for (; step < end; ++step) {
        ring.wait_emptied();
        copy_weights(ring, channel, step), copy_inputs(ring, row, step);
        ring.next();
      }
    });
  }

  __device__ void copy_weights(const Ring& to, int channel, int step) const {
    arrive_before(to.filled(), STAGE_BYTES);
    copy_box(to.weights(), weight, channel / CHANNELS, step * (PIECE_BYTES / 4), to.filled());
  }

  __device__ void copy_inputs(const Ring& to, int row, int step) const {
    copy_box(to.inputs(), x, row, step * STEP, to.filled());
  }
};

// By four lanes, of a row each of four words: the words of a column.
__device__ inline void transpose(u32* words) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    bool later = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      u32 other = __shfl_xor_sync(~0u, later ? words[i] : words[i | bit], bit);
      if (later) words[i] = other;
      else words[i | bit] = other;
    }
  }
}

// A thread's weights of 32 inputs (64 where 4 bits), as packing.py lays them out: word i becomes those of inputs 2 i
// and 2 i + 1 of its eight, of all its channels (and of both halves); or, exchanged, of inputs 8 i + 2 t and behind it.
__device__ inline void take_pairs(const uint4& w, u32* words) {
#if BITS == 8
  words[0] = __byte_perm(w.x, w.z, 0x5410), words[1] = __byte_perm(w.x, w.z, 0x7632);
  words[2] = __byte_perm(w.y, w.w, 0x5410), words[3] = __byte_perm(w.y, w.w, 0x7632);
#else
  const u32 low = 0x0f0f0f0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    u32 near = __byte_perm(w.x, w.z, i ? 0x7351 : 0x6240), far = __byte_perm(w.y, w.w, i ? 0x7351 : 0x6240);
    words[2 * i] = (near & low) | (far << 4 & ~low), words[2 * i + 1] = (near >> 4 & low) | (far & ~low);
  }
#endif
  if (!INPUTS_ORDERED) transpose(words);
}

// The k-th 16 of those inputs, as float16.
__device__ inline void unpack_pairs(const u32* words, int k, u32* a) {
#if BITS == 8
  unpack8(words[2 * k], a), unpack8(words[2 * k + 1], a + 2);
#else
  u32 pairs[8];
  unpack4(words[2 * (k % 2)], pairs), unpack4(words[2 * (k % 2) + 1], pairs + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pairs[i / 2 * 4 + k / 2 * 2 + i % 2];
#endif
}

// By the four warps of a group: a thread's sums of its 64 channels, as in wgmma_sums.cuh. While the tensor cores multiply a step the next one's weights are unpacked.
struct Products {
  Ring weights, inputs, before;

  __device__ explicit Products(u32 shared) : weights{shared}, inputs{shared}, before{shared, DEPTH - 1} {}

  // The last two steps are apart, as a branch in the loop would keep it from having products under way.
  __device__ void run(float* sums, int steps) {
    u32 words[LOADS][4], even[STEP / 4], odd[STEP / 4];
    take_step(words);
    unpack_step(words, even);
#pragma unroll 1
    for (int step = 0; step < steps - 2; step += 2) {
      begin_step(sums, even, step > 0);
      take_step(words);
      finish_step(step > 0);
      unpack_step(words, odd);
      begin_step(sums, odd, true);
      take_step(words);
      finish_step(true);
      unpack_step(words, even);
    }
    begin_step(sums, even, steps > 2);
    take_step(words);
    finish_step(steps > 2);
    unpack_step(words, odd);
    begin_step(sums, odd, true);
    finish_step(true);
    finish();
    arrive_once(before.emptied());
  }

  static constexpr int LOADS = BITS / 4, EACH = STEP / 16 / LOADS;

  __device__ void take_step(u32 (*words)[4]) {
    u32 own = weights.weights() + threadIdx.x / 32 * PIECE_BYTES + threadIdx.x % 32 * 16;
    weights.wait_filled();
#pragma unroll
    for (int i = 0; i < LOADS; ++i) take_pairs(load_shared(own + i * 512), words[i]);
    weights.next();
  }

  __device__ void unpack_step(const u32 (*words)[4], u32* a) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
#pragma unroll
      for (int k = 0; k < EACH; ++k) unpack_pairs(words[i], k, a + (i * EACH + k) * 4);
  }

  __device__ void begin_step(float* sums, const u32* a, bool more) {
    u64 x = descriptor(inputs.inputs());
    begin();
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) Product<ROWS>::add(sums, a + 4 * k, x + 2 * k, more || k > 0);
    commit();
    inputs.next();
  }

  // Of the step before the one that was begun last, if any.
  __device__ void finish_step(bool any) {
    finish<1>();
    arrive_once(before.emptied(), any), before.next();
  }
};

// Where an even channel of y goes.
__device__ inline int place_of(int channel) {
  if (!RELU) return channel;
  return (channel & ~31) | (channel & 6) << 2 | (channel >> 2 & 6);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const u16* scales,
           const u16* bias, void* out, int rows, int channels, int inputs, int splits) {
  extern __shared__ __align__(1024) char memory[];
  u32 shared = (u32)__cvta_generic_to_shared(memory);
  if (threadIdx.x == 0) {
    Ring ring{shared};
    do {
      init_barrier(ring.filled(), 1), init_barrier(ring.emptied(), 4 * WARPGROUPS);
      ring.next();
    } while (ring.stage > 0);
    publish_barriers();
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");

  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Shape shape{inputs, channels, rows, splits};
  if (warp >= 4 * WARPGROUPS) {
    if (MOVES_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 128 * WARPGROUPS) Copies{x, weight, shape, Ring{shared}}.run();
    return;
  }
  if (MOVES_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  Products products{shared};
  shape.for_own([&](int first_channel, int first_row, int split, int, int steps) {
    float sums[ROWS / 2], scale[2], offset[2] = {0, 0};
    int channel = first_channel + 16 * warp + lane / 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int there = min(channel + 8 * k, channels - 1);
      scale[k] = half_to_float(scales[there]);
      if (!PARTS) offset[k] = half_to_float(bias[there]);
    }
    products.run(sums, steps);
    if (PARTS) {
      float* to = (float*)out + ((long long)split * rows + first_row) * channels + channel;
      store_sums<ROWS>(sums, [=](int row, int farther, float sum) {
        if (first_row + row < rows && channel + farther < channels) to[row * channels + farther] = sum * scale[farther / 8];
      });
    } else {
      u16* to = (u16*)out + (long long)first_row * channels;
      auto become = [=](float sum, int k) {
        float y = sum * scale[k] + offset[k];
        return RELU ? fmaxf(y, 0.0f) : y;
      };
      store_pairs<ROWS>(sums, become, [=](int row, int farther, u32 pair) {
        int even = (channel & ~1) + farther;
        if (first_row + row < rows && even < channels) *(u32*)(to + row * channels + place_of(even)) = pair;
      });
    }
  });
}

// y = x Wᵀ for the tokens of one picture, on a Hopper: a linear of its ViT.
//
// The tensor cores take 64 channels as M and half of ViT-g's 257 tokens as N, up to ROWS of them; with tokens as M
// they would be five times 64. WARPGROUPS of four warps, each with its channels, share a block's tokens. What takes
// time is copying to shared memory, at 64 bytes a clock, and waiting for the kernel before. So a warp of its own copies
// DEPTH steps ahead, and the weights before it waits (PDL). The blocks of a cluster have the same channels, of all
// tokens between them: each copies a share of the weights to all.
//
// Where channels are few, SPLIT blocks share out their inputs and write PARTS of the sums in float32, which whoever
// normalises them next adds up, always in the same order: no result depends on timing.
//
// Compiled by NVRTC with INPUTS and CHANNELS of the weight, WARPGROUPS, ROW_TILES, SPLIT, DEPTH, SHARED, PARTS and
// GELU defined; cuda_picture.py says how they are chosen.

#include "hopper_copies.cuh"
#include "wgmma_products.cuh"
#include "wgmma_sums.cuh"

#define STEP 64   // inputs: 128 bytes
#define ROWS 136  // of a tile

constexpr int TILE = 64 * WARPGROUPS, STEPS = INPUTS / STEP;
constexpr int WEIGHT_BYTES = TILE * 128, STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
constexpr int BARRIERS = DEPTH * STAGE_BYTES;  // of each stage, when it is filled and when emptied
static_assert(INPUTS % STEP == 0 && CHANNELS % TILE == 0 && TILE % (8 * ROW_TILES) == 0, "a linear's shape");
static_assert(SPLIT <= STEPS && (PARTS || SPLIT == 1), "blocks without inputs, or whose sums nobody adds up");
static_assert(BARRIERS + 16 * DEPTH <= SHARED, "shared memory is too small");

// Where in the ring of stages a warp is.
struct Ring {
  u32 shared;
  int stage = 0, phase = 0;

  __device__ u32 weights() const { return shared + stage * STAGE_BYTES; }
  __device__ u32 inputs() const { return weights() + WEIGHT_BYTES; }
  __device__ u32 filled() const { return shared + BARRIERS + 16 * stage; }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ void next() {
    if (++stage == DEPTH) stage = 0, phase ^= 1;
  }
};

// By one thread: `steps` steps from an input on, of the block's channels and rows.
__device__ inline void copy_steps(const TensorMap& x, const TensorMap& weight, u32 shared, int row, int channel,
                                  int input, int steps) {
  constexpr int SHARE = TILE / ROW_TILES;
  int block = ROW_TILES > 1 ? block_of_cluster() : 0;
  auto copy_weights = [&](const Ring& ring, int step) {
    arrive_before(ring.filled(), STAGE_BYTES);
    u32 to = ring.weights() + block * (SHARE * 128);
    int first = channel + block * SHARE, column = input + step * STEP;
    if (ROW_TILES > 1) copy_box_to_all<ROW_TILES>(to, weight, first, column, ring.filled());
    else copy_box(to, weight, first, column, ring.filled());
  };
  auto copy_inputs = [&](const Ring& ring, int step) {
    copy_box(ring.inputs(), x, row, input + step * STEP, ring.filled());
  };
  prefetch(weight), prefetch(x);
  int ahead = min(DEPTH, steps);
  Ring ring{shared}, behind{shared};
  for (int step = 0; step < ahead; ++step) copy_weights(ring, step), ring.next();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int step = 0; step < ahead; ++step) copy_inputs(behind, step), behind.next();
  ring = Ring{shared};
  // To the end of the last step: no block may end while another of its cluster still arrives at its barriers.
  for (int step = ahead; step < steps + ahead; ++step) {
    wait_for(ring.emptied(), ring.phase);
    if (step < steps) copy_weights(ring, step), copy_inputs(ring, step);
    ring.next();
  }
}

// By the four warps of a group: a thread's sums of its 64 channels, as in wgmma_sums.cuh.
__device__ inline void multiply(float* sums, u32 shared, int group, int steps) {
  Ring ring{shared}, before{shared};
  auto begin_step = [&](bool more) {
    wait_for(ring.filled(), ring.phase);
    u64 weights = descriptor(ring.weights() + group * (64 * 128)), x = descriptor(ring.inputs());
    begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) Product<ROWS>::add(sums, weights + 2 * k, x + 2 * k, more || k > 0);
    commit();
    ring.next();
  };
  auto release = [&] {
    if (ROW_TILES == 1) arrive_once(before.emptied());
#pragma unroll
    for (int block = 0; ROW_TILES > 1 && block < ROW_TILES; ++block) arrive_once_at(before.emptied(), block);
    before.next();
  };
  begin_step(false);
#pragma unroll 1
  for (int step = 1; step < steps; ++step) {
    begin_step(true);
    finish<1>();
    release();
  }
  finish();
  release();
}

__device__ inline float gelu(float x) {  // its tanh approximation, as x / (1 + e^-2u)
  float minus_2u = x * fmaf(x * x, -2 * 0.7978845608f * 0.044715f, -2 * 0.7978845608f), e;
  asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(minus_2u * 1.4426950409f));
  return __fdividef(x, 1 + e);
}

extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS + 32, 1)
    linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const u16* bias, void* out,
           int rows) {
  extern __shared__ __align__(1024) char memory[];
  u32 shared = (u32)__cvta_generic_to_shared(memory);
  if (threadIdx.x == 0) {
    Ring ring{shared};
    do {
      init_barrier(ring.filled(), 1), init_barrier(ring.emptied(), 4 * WARPGROUPS * ROW_TILES);
      ring.next();
    } while (ring.stage > 0);
    publish_barriers();
  }
  __syncthreads();
  if (ROW_TILES > 1) meet_cluster();
  asm volatile("griddepcontrol.launch_dependents;");

  int row_tile = blockIdx.x % ROW_TILES, tile = blockIdx.x / ROW_TILES, split = blockIdx.y;
  int first_step = split * STEPS / SPLIT, steps = (split + 1) * STEPS / SPLIT - first_step;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 4 * WARPGROUPS) {
    if (lane == 0) copy_steps(x, weight, shared, row_tile * ROWS, tile * TILE, first_step * STEP, steps);
    __syncwarp();
  } else {
    int channel = tile * TILE + 16 * warp + lane / 4, first_row = row_tile * ROWS;
    float offset[2] = {0, 0};
    if (!PARTS) offset[0] = half_to_float(bias[channel]), offset[1] = half_to_float(bias[channel + 8]);
    float sums[ROWS / 2];
    multiply(sums, shared, warp / 4, steps);
    if (PARTS) {
      float* to = (float*)out + (split * rows + first_row) * CHANNELS + channel;
      store_sums<ROWS>(sums, [=](int row, int farther, float sum) {
        if (first_row + row < rows) to[row * CHANNELS + farther] = sum;
      });
    } else {
      u16* to = (u16*)out + first_row * CHANNELS + (channel & ~1);
      auto become = [=](float sum, int k) { return GELU ? gelu(sum + offset[k]) : sum + offset[k]; };
      store_pairs<ROWS>(sums, become, [=](int row, int farther, u32 pair) {
        if (first_row + row < rows) *(u32*)(to + row * CHANNELS + farther) = pair;
      });
    }
  }
}

// From what attention has mixed to the next layer's queries, keys and values, for some tens of rows, as one kernel:
// dense, the residual stream's norm, fc with ReLU, proj, the next norm, qkv.
//
// The weights are most of what is read and depend on nothing. In each block, of which every multiprocessor has one,
// a warp copies them ahead, far into the next linear, while blocks wait for one another: as kernels of
// their own the linears begin and end with the memory idle. Another warp copies inputs, as soon as they are
// there. Packed weights of 8 and 4 bits are unpacked in shared memory by warps of their own, by turns. Four warps
// multiply: the tensor cores take the rows as 64, and a block's channels as a TILE of any number of sixteens, so
// that all blocks have the same to do.
//
// dense and proj have few channels: SPLIT blocks share out their inputs, and write sums that whoever computes
// the norm of a row adds up, always in the same order, so that no result depends on timing. Counters say how many
// blocks have written what others wait for.
//
//   span_shapes.cuh   which block has which part of a linear; shared memory, and how blocks wait for one another
//   span_copies.cuh   weights and inputs on their way, and packed weights to float16
//   span_linears.cuh  the products
//   span_stream.cuh   the residual stream and its LayerNorm
//
// docs/span.md argues why blocks may wait for one another so.
//
// Compiled by NVRTC with BITS, WIDTH, FFN, BLOCKS, SPLIT, the TILEs (DENSE_TILE, FC_TILE, PROJ_TILE, QKV_TILE),
// WEIGHTS_DEPTH, INPUTS_DEPTH, UNPACKED_DEPTH, UNDER_WAY and SHARED defined; span.py says how they are chosen.

#include "span_copies.cuh"
#include "span_linears.cuh"
#include "span_stream.cuh"

__device__ inline void store_halves(u16* at, float first, float second) {
  *(u32*)at = float_to_half(first) | (u32)float_to_half(second) << 16;
}

// Registers go from the warps that unpack and copy to those that multiply, no more than the former had.
constexpr int GIVERS_KEEP = 56, MULTIPLIERS_HAVE = 200;
constexpr int AT_FIRST = 65536 / (32 * WARPS) / 8 * 8;
static_assert(!TEAMS || (WARPS - MULTIPLIERS) * (AT_FIRST - GIVERS_KEEP) >= MULTIPLIERS * (MULTIPLIERS_HAVE - AT_FIRST),
              "a block would wait for registers for ever");
__device__ inline void give_registers() {
  if (TEAMS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GIVERS_KEEP));
}
__device__ inline void take_registers() {
  if (TEAMS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLIERS_HAVE));
}

// Never set back, so that whatever was launched before, and whether it was all, a launch finds them as it needs.
struct Counters {
  u64 finished;                         // blocks
  u32 dense, post, hidden, proj, next;  // blocks, or rows of the norms post and next, whose part is written

  // Of launches, this one included. Blocks may ask while others have finished.
  __device__ u32 turn() const { return *(const volatile u64*)&finished / BLOCKS + 1; }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    span(const __grid_constant__ TensorMap attended, const __grid_constant__ TensorMap normed_boxes,
         const __grid_constant__ TensorMap hidden_boxes, const __grid_constant__ Weights dense,
         const __grid_constant__ Weights fc, const __grid_constant__ Weights proj, const __grid_constant__ Weights qkv,
         const u16* dense_scales, const u16* fc_scales, const u16* proj_scales, const u16* qkv_scales,
         const u16* dense_bias, const u16* fc_bias, const u16* proj_bias, const u16* qkv_bias, const u16* post_weight,
         const u16* post_shift, const u16* next_weight, const u16* next_shift, float* x, float* parts, u16* normed,
         u16* hidden, u16* next_qkv, Counters* counters, int rows, float eps) {
  extern __shared__ __align__(1024) char memory[];
  u32 shared = (u32)__cvta_generic_to_shared(memory);
  volatile u32* exchanging = (u32*)(memory + EXCHANGING);  // from a linear's sums to the next one's inputs
  if (threadIdx.x == 0) {
    *exchanging = false;
    WeightsRing{shared}.init(1, BITS == 16 ? MULTIPLIERS : TEAMS * TEAM);
    InputsRing{shared}.init(1, MULTIPLIERS);
    UnpackedRing{shared}.init(TEAM, MULTIPLIERS);
    publish_barriers();
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");

  int warp = threadIdx.x / 32;
  if (warp >= MULTIPLIERS) {
    give_registers();
    if (warp == MULTIPLIERS + TEAMS * TEAM) {
      WeightCopies copies{{shared}, {shared}, exchanging};
      copies.run<Dense>(dense), copies.run<Fc>(fc), copies.run<Proj>(proj), copies.run<Qkv>(qkv);
    } else if (warp == MULTIPLIERS + TEAMS * TEAM + 1) {
      if (threadIdx.x % 32 == 0) {
        prefetch(attended), prefetch(normed_boxes), prefetch(hidden_boxes);
        asm volatile("griddepcontrol.wait;" ::: "memory");
        InputCopies copies{{shared}, exchanging};
        copies.run<Dense>(attended, nullptr, 0);
        u32 turn = counters->turn();
        copies.run<Fc>(normed_boxes, &counters->post, turn * rows);
        copies.run<Proj>(hidden_boxes, &counters->hidden, turn * Fc::SHARERS);
        copies.run<Qkv>(normed_boxes, &counters->next, turn * rows);
      }
    }
#if BITS < 16
    else if (warp < MULTIPLIERS + TEAMS * TEAM) {
      Unpacking unpacking{{shared}, {shared}};
      unpacking.run<Dense>(), unpacking.run<Fc>(), unpacking.run<Proj>(), unpacking.run<Qkv>();
    }
#endif
    return;
  }
  take_registers();
  Stream::prefetch(dense_bias), Stream::prefetch(post_weight), Stream::prefetch(post_shift);
  Stream::prefetch(proj_bias), Stream::prefetch(next_weight), Stream::prefetch(next_shift);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  Products products{{shared}, {shared}, rows};
  Stream stream{x, parts, normed, rows, eps, (float*)(memory + SCRATCH)};
  auto to_parts = [=](int row, int channel, int split, float2 y) {
    *(float2*)(parts + (split * ROWS + row) * WIDTH + channel) = y;
  };
  auto pass_on = [=](u32* counter) {
    if (threadIdx.x == 0) *exchanging = true;
    tell(counter);
  };
  products.run<Dense, false>(dense_scales, nullptr, to_parts);
  if (blockIdx.x < Dense::SHARERS) pass_on(&counters->dense);
  u32 turn = counters->turn();
  stream.run(dense_bias, post_weight, post_shift, &counters->dense, turn * Dense::SHARERS, &counters->post);
  products.run<Fc, true>(fc_scales, fc_bias, [=](int row, int channel, int, float2 y) {
    store_halves(hidden + row * FFN + channel, fmaxf(y.x, 0.0f), fmaxf(y.y, 0.0f));
  });
  if (blockIdx.x < Fc::SHARERS) pass_on(&counters->hidden);
  products.run<Proj, false>(proj_scales, nullptr, to_parts);
  if (blockIdx.x < Proj::SHARERS) pass_on(&counters->proj);
  stream.run(proj_bias, next_weight, next_shift, &counters->proj, turn * Proj::SHARERS, &counters->next);
  products.run<Qkv, true>(qkv_scales, qkv_bias, [=](int row, int channel, int, float2 y) {
    store_halves(next_qkv + row * (3 * WIDTH) + channel, y.x, y.y);
  });
  sync_multipliers();
  if (threadIdx.x == 0) asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" ::"l"(&counters->finished) : "memory");
}

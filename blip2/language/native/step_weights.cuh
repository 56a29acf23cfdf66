// The weights of step.cu on their way from global to shared memory: a warp of its own in each block
// copies them, far ahead, into a ring of DEPTH stages.
//
// Bulk copies, of which at most UNDER_WAY are on their way at a time: with more, what the blocks write for one
// another would wait behind them. Barriers in shared memory say which stages are full and which empty.

#pragma once

#include "step_shares.cuh"

constexpr int STAGE_BYTES =
    BITS == 16 || HEAD_BITS == 16 ? CHANNELS * (WARPS * 128 + 64) : WARPS * 128 * STAGE;
static_assert(BITS == 16 || STAGE >= BITS, "a stage holds no slab of the layers' weights");
static_assert(HEAD_BITS == 16 || STAGE >= HEAD_BITS, "a stage holds no slab of the head's weights");
template <int WHICH>
__host__ __device__ constexpr bool fits() {
  using S = Shape<WHICH>;
  return (S::PLAIN ? CHANNELS * S::PITCH : S::GANG * S::SLAB) <= STAGE_BYTES;
}
static_assert(fits<QKV>() && fits<DENSE>() && fits<FC>() && fits<PROJ>() && fits<HEAD>(),
              "a gang is larger than a stage");
static_assert(0 < UNDER_WAY && UNDER_WAY <= DEPTH, "more copies are to be under way than there are stages");

// Where a warp is in the ring, and the barriers that say which stages are full and which empty.
struct Ring {
  u32 stages, full, empty;  // shared memory addresses
  int stage = 0, phase = 0;
  unsigned long long once;  // the L2 cache may forget weights first: the rest stays

  __device__ Ring(const void* stages, const void* barriers)
      : stages((u32)__cvta_generic_to_shared(stages)), full((u32)__cvta_generic_to_shared(barriers)),
        empty(full + 8 * DEPTH) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  }

  __device__ void prepare() const {  // by one thread, before any other uses it
    for (int i = 0; i < DEPTH; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(full + 8 * i) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty + 8 * i), "n"(WARPS) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ void next() {
    if (++stage == DEPTH) stage = 0, phase ^= 1;
  }

  static __device__ void wait(u32 barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
  }

  // The address of the next stage, once it is there.
  __device__ u32 wait_full() const {
    wait(full + 8 * stage, phase);
    return stages + stage * STAGE_BYTES;
  }

  // By a whole warp, when it has read its part of the stage.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty + 8 * stage) : "memory");
    next();
  }

  // By the copying warp: the next stage from `from`, in `pieces` pieces `stride` bytes apart.
  __device__ void copy(const char* from, int pieces, int bytes, int stride, int pitch) {
    int lane = threadIdx.x % 32;
    u32 barrier = full + 8 * stage;
    if (UNDER_WAY < DEPTH) {
      int before = stage < UNDER_WAY ? stage - UNDER_WAY + DEPTH : stage - UNDER_WAY;
      wait(full + 8 * before, stage < UNDER_WAY ? phase ^ 1 : phase);
    }
    wait(empty + 8 * stage, phase ^ 1);
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(pieces * bytes)
                   : "memory");
    __syncwarp();
    if (lane < pieces)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
              stages + stage * STAGE_BYTES + lane * pitch),
          "l"(from + (long long)lane * stride), "r"(bytes), "r"(barrier), "l"(once)
          : "memory");
    next();
  }
};

template <int WHICH>
__device__ inline void copy_linear(Ring& ring, const Linear& linear) {
  using S = Shape<WHICH>;
  int end = S::first_slab(blockIdx.x + 1);
  for (int slab = S::first_slab(blockIdx.x), next; slab < end; slab = next) {
    next = min((slab / S::GANG + 1) * S::GANG, end);
    long long tile = slab / S::SLABS;
    int part = slab % S::SLABS;
    if (S::PLAIN)
      ring.copy(linear.weight + tile * CHANNELS * (S::K * S::bits / 8) + part * S::ROW, CHANNELS,
                (next - slab) * S::ROW, S::K * S::bits / 8, S::PITCH);
    else  // one slab behind the other
      ring.copy(linear.weight + (tile * S::SLABS + part) * S::SLAB, 1, (next - slab) * S::SLAB, 0, 0);
  }
}

// All weights of the step, in the order of their use.
__device__ inline void copy_weights(Ring& ring, const Model& model) {
#pragma unroll 1
  for (int index = 0; index < LAYERS; ++index) {
    const Layer& layer = model.layers[index];
    copy_linear<QKV>(ring, layer.qkv);
    copy_linear<DENSE>(ring, layer.dense);
    copy_linear<FC>(ring, layer.fc);
    copy_linear<PROJ>(ring, layer.proj);
  }
  copy_linear<HEAD>(ring, model.head);
}

// A thread's weights of a full slab: of PLAIN ones those of its near and its far channel by turns.
template <int WHICH>
__device__ inline void read_slab(u32 slab, uint4* w) {
  using S = Shape<WHICH>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 at = S::PLAIN ? slab + lane / 4 * S::PITCH + warp * (S::ROW / WARPS) + lane % 4 * 16
                    : slab + warp * (S::LOADS * 512) + lane * 16;
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i)
    w[i] = load_shared(at + (S::PLAIN ? i / 2 * 64 + i % 2 * 8 * S::PITCH : i * 512));
}

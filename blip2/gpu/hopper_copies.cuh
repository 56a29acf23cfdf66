// Copies that one thread begins (TMA), and the barriers in shared memory (mbarrier) that say when a copy is
// there, or its place free again. Hopper and later.

#pragma once

#include "halves.cuh"

struct alignas(64) TensorMap {  // a matrix for copies of its boxes (Boxes in boxes.py); the driver knows what is in it
  unsigned long long opaque[16];
};

__device__ inline void init_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Behind the barriers that a thread has initialised, before others use them.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// By the first lane of a warp, if it is to; not as a branch, at which products that are under way would be waited for.
__device__ inline void arrive_once(u32 barrier, bool any = true) {
  asm volatile("{\n.reg .pred first;\nsetp.eq.u32 first, %1, 0;\n@first mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
               "r"(any ? threadIdx.x % 32 : 32)
               : "memory");
}

// The same, at the barrier in that place of a block of the cluster. What a warp has read through the tensor cores
// needs no order; with it a step would wait for all that the thread has under way.
__device__ inline void arrive_once_at(u32 barrier, int block) {
  asm volatile(
      "{\n.reg .pred first;\n.reg .b32 there;\nsetp.eq.u32 first, %1, 0;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "@first mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(threadIdx.x % 32), "r"(block)
      : "memory");
}

__device__ inline int block_of_cluster() {
  int block;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  return block;
}

// By all threads of a cluster: waits for them. It orders no reads and writes but those of published barriers.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Arrives, and has the barrier wait for so many bytes of copies, too.
__device__ inline void arrive_before(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of a barrier's phase; phases are 0 and 1 by turns, and the one before the first has ended.
__device__ inline void wait_for(u32 barrier, int phase) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

__device__ inline void copy(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// The box of a matrix that begins at a row and a column; what lies outside the matrix is zeros.
__device__ inline void copy_box(u32 to, const TensorMap& matrix, int row, int column, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(to),
      "l"(&matrix), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same, to the same place of each of the first TARGETS blocks of a cluster, whose own barriers say that it is there.
template <int TARGETS>
__device__ inline void copy_box_to_all(u32 to, const TensorMap& matrix, int row, int column, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&matrix), "r"(column), "r"(row), "r"(barrier), "h"((u16)((1 << TARGETS) - 1))
      : "memory");
}

// Before the first copy from it, which is sooner there then.
__device__ inline void prefetch(const TensorMap& matrix) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&matrix) : "memory");
}

// Hopper's products of four warps (wgmma), but for the instruction itself.

#pragma once

#include "halves.cuh"

// Where the tensor cores find a block of rows of 128 bytes in shared memory, at a multiple of 1024: pieces of 16
// bytes are swapped about by row (1 << 62), piece p of row r lies where p ^ r % 8 would; eight rows have 1024 bytes. In
// units of 16 bytes.
__device__ inline u64 descriptor(u32 block) { return block >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// Products are begun in groups, which end in that order.
__device__ inline void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last so many.
template <int GROUPS = 0>
__device__ inline void finish() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

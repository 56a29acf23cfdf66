// The inputs of a linear in shared memory, as float16, from what other blocks wrote.

#pragma once

#include "step_marks.cuh"

// Where a block begins to read what all blocks read: each elsewhere, lest all ask for the same at once.
template <int COUNT>
__device__ inline int rotated(int i) {
  i += blockIdx.x * (COUNT / BLOCKS);
  return i < COUNT ? i : i - COUNT;
}

__device__ inline void lay_out(u16* at, const uint4& words, const float*) {
  *(uint2*)at = to_halves((const float*)&words);
}

__device__ inline void lay_out(u16* at, const uint4& words, const u16*) { *(uint4*)at = words; }

// Waits until all of a vector has this mark, and lays it out as inputs.
template <int INPUTS, typename Word>
__device__ inline void load_inputs(const Word* from, u16* input, u32 mark) {
  constexpr int EACH = 16 / sizeof(Word), LOADS = INPUTS / EACH;  // inputs of a load, and loads
  constexpr int MINE = (LOADS + THREADS - 1) / THREADS;
  auto asked = [](int i) { return threadIdx.x + i * THREADS < LOADS; };
  auto place = [](int i) { return EACH * rotated<LOADS>(threadIdx.x + i * THREADS); };
  uint4 words[MINE];
  read_marked(words, mark, asked, [&](int i) { return from + place(i); });
#pragma unroll
  for (int i = 0; i < MINE; ++i)
    if (asked(i)) lay_out(input + place(i), words[i], from);
  sync();
}

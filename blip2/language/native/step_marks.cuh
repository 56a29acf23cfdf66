// How the threads of a block wait for one another, and how the blocks of step.cu pass words to one
// another: each word in global memory carries a mark, a bit that says whether it is of this time or of
// the time before, and a reader asks until all words it reads have the mark it waits for.
//
// docs/step.md argues why that is safe.

#pragma once

#include "step_shares.cuh"

__device__ inline void sync() {  // all warps but the copying one
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The mark is the lowest bit of a float, and of the halves that write_marked_relu writes the sign.
constexpr u32 FLOAT_MARK = 1, HALVES_MARK = 0x80008000;

__device__ constexpr u32 mark_of(const float*) { return FLOAT_MARK; }
__device__ constexpr u32 mark_of(const u16*) { return HALVES_MARK; }

__device__ inline void write_marked(float* at, float value, u32 mark) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at),
               "r"(__float_as_uint(value) & ~FLOAT_MARK | mark)
               : "memory");
}

// ReLU of x in float16. That is never negative, which leaves the sign to the mark.
__device__ inline void write_marked_relu(u16* at, float x, u32 mark) {
  u16 half = float_to_half(fmaxf(x, 0.0f));
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(at), "h"((u16)(half & 0x7fff | mark << 15))
               : "memory");
}

// Reads 16 bytes from at(i), for each i < COUNT for which asked(i) is true, again and again until all
// words have this mark; then takes the marks off.
template <int COUNT, typename Asked, typename At>
__device__ inline void read_marked(uint4 (&words)[COUNT], u32 mark, Asked asked, At at) {
  constexpr u32 MARK = mark_of(decltype(at(0)){});
  static_assert(COUNT <= 32, "a thread reads more marked words than `missing` has bits");
  u32 wanted = mark ? MARK : 0, missing = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    words[i] = uint4{};  // else registers would be kept for what they are before
    if (asked(i)) missing |= 1u << i;
  }
  do {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (missing >> i & 1)
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                     : "l"(at(i))
                     : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const uint4& w = words[i];
      u32 others = (w.x ^ wanted | w.y ^ wanted | w.z ^ wanted | w.w ^ wanted) & MARK;
      if (!others) missing &= ~(1u << i);
    }
  } while (missing);
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    words[i].x &= ~MARK, words[i].y &= ~MARK, words[i].z &= ~MARK, words[i].w &= ~MARK;
}

__device__ inline float read_marked(const float* at, u32 mark) {
  u32 word;
  do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  while ((word & FLOAT_MARK) != mark);
  return __uint_as_float(word & ~FLOAT_MARK);
}

// What the kernels share: weights unpacked, and the product of 16 channels and 8 rows through the tensor
// cores.
//
// With the order of k inside a group of inputs chosen freely (a sum does not mind), each thread
// takes 16 consecutive bytes of weights and of inputs: thread (g = lane / 4, t = lane % 4) has
// channels g and g + 8 and, of 32 inputs, 8t .. 8t + 7; the first mma sees 8t .. 8t + 3, the second
// 8t + 4 .. 8t + 7, as its k = 2t, 2t+1, 2t+8, 2t+9. Weights of 16 bits lie as PyTorch has them,
// N x K; those of 8 and 4 bits are packed in that order (packing.py), biased to be unsigned.
//
// Compiled with FLOAT8, weights of 8 bits are E4M3 instead, and lie as PyTorch has them too. There 16
// bytes are 16 inputs: of 64, 16t .. 16t + 15, in two halves.

#pragma once

#include "halves.cuh"

#ifndef FLOAT8
#define FLOAT8 0
#endif

#define CHANNELS 16  // that one product yields

__device__ inline u32 subtract(u32 a, u32 b) {
  u32 d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ inline u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Four unsigned bytes, biased by 128, to two pairs of float16: 0x64xx is 1024 + xx.
__device__ inline void unpack8(u32 q, u32* pairs) {
  pairs[0] = subtract(__byte_perm(q, 0x64646464, 0x4140), 0x64806480);
  pairs[1] = subtract(__byte_perm(q, 0x64646464, 0x4342), 0x64806480);
}

__device__ inline u32 masked(u32 a, u32 mask, u32 base) {  // a & mask | base
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(base));
  return d;
}

// Eight nibbles, biased by 8, to four pairs of float16. Pair i is nibbles i and i + 4: those in the
// high half of a byte come out as 1024 + 16 n and are scaled back.
__device__ inline void unpack4(u32 q, u32* pairs) {
  const u32 low = 0x000f000f, high = 0x00f000f0, sixteenth = 0x2c002c00, minus_72 = 0xd480d480;
  u32 base;  // from a register: an instruction has room for one constant
  asm("mov.b32 %0, 0x64006400;" : "=r"(base));
  u32 later = q >> 8;
  pairs[0] = subtract(masked(q, low, base), 0x64086408);
  pairs[1] = multiply_add(masked(q, high, base), sixteenth, minus_72);
  pairs[2] = subtract(masked(later, low, base), 0x64086408);
  pairs[3] = multiply_add(masked(later, high, base), sixteenth, minus_72);
}

__device__ inline void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four E4M3 to two pairs of float16, which have them all.
__device__ inline void unpack_float8(u32 q, u32* pairs) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(q));
}

// How weights of so many bits come: a GROUP of inputs in LOADS 16-byte loads of each thread.
template <int bits>
struct Format {
  static constexpr bool IS_FLOAT8 = FLOAT8 && bits == 8;
  static constexpr bool PLAIN = bits == 16 || IS_FLOAT8;  // N x K, with a load for either channel
  static constexpr int GROUP = bits == 4 || IS_FLOAT8 ? 64 : 32;
  static constexpr int LOADS = PLAIN ? 2 : 1;
  static constexpr int HALVES = GROUP / 32;  // the 32 inputs that two mma cover
  // Of a thread's inputs in a group: where the first are, and how far on those of the second half.
  static constexpr int INPUTS = IS_FLOAT8 ? 16 : 8;
  static constexpr int HALF = IS_FLOAT8 ? 8 : 32;
};

// What a channel's sums are to be multiplied with: float16, beside E4M3 float32.
template <int bits>
__device__ inline float scale_at(const void* scales, int channel) {
  if constexpr (Format<bits>::IS_FLOAT8) return ((const float*)scales)[channel];
  if constexpr (bits < 16) return half_to_float(((const u16*)scales)[channel]);
  return 1.0f;
}

// Calls multiply(near, far, half) with the weights of 32 inputs as pairs, for each half of a group:
// near those of channel g, far those of g + 8.
template <int bits, typename Multiply>
__device__ inline void unpack(const uint4* w, Multiply multiply) {
  if constexpr (bits == 16) {
    multiply((const u32*)&w[0], (const u32*)&w[1], 0);
  } else {
    u32 near[4], far[4];
    if constexpr (Format<bits>::IS_FLOAT8) {
      unpack_float8(w[0].x, near);
      unpack_float8(w[0].y, near + 2);
      unpack_float8(w[1].x, far);
      unpack_float8(w[1].y, far + 2);
      multiply(near, far, 0);
      unpack_float8(w[0].z, near);
      unpack_float8(w[0].w, near + 2);
      unpack_float8(w[1].z, far);
      unpack_float8(w[1].w, far + 2);
      multiply(near, far, 1);
    } else if constexpr (bits == 8) {
      unpack8(w[0].x, near);
      unpack8(w[0].y, near + 2);
      unpack8(w[0].z, far);
      unpack8(w[0].w, far + 2);
      multiply(near, far, 0);
    } else {
      unpack4(w[0].x, near);
      unpack4(w[0].y, far);
      multiply(near, far, 0);
      unpack4(w[0].z, near);
      unpack4(w[0].w, far);
      multiply(near, far, 1);
    }
  }
}

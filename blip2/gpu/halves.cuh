// float16 by hand: NVRTC has no headers.

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__device__ inline float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ inline u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// Four or eight halves to floats, and back.
__device__ inline void to_floats(uint2 halves, float* out) {
  out[0] = half_to_float(halves.x & 0xffff), out[1] = half_to_float(halves.x >> 16);
  out[2] = half_to_float(halves.y & 0xffff), out[3] = half_to_float(halves.y >> 16);
}

__device__ inline void to_floats(uint4 halves, float* out) {
  to_floats(uint2{halves.x, halves.y}, out), to_floats(uint2{halves.z, halves.w}, out + 4);
}

__device__ inline uint2 to_halves(const float* in) {
  return {float_to_half(in[0]) | (u32)float_to_half(in[1]) << 16,
          float_to_half(in[2]) | (u32)float_to_half(in[3]) << 16};
}

__device__ inline uint4 load_shared(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

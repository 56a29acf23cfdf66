// Products of 64 rows of inputs and so many channels, both in shared memory, 16 inputs of each.

#pragma once

#include "wgmma.cuh"

template <int CHANNELS_>
struct Product;

#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define EIGHT(i) FOUR(i), FOUR(i + 4)
#define SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SUMS_16 SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_24 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_32 SUMS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_40 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"

// `x` and `w` are descriptors; with `more` the product is added to the sums c, or these begin with it. The numbers
// of the last three operands follow those of the sums.
#define PRODUCT(channels, sums, x_operand, w_operand, more_operand, ...)                                  \
  template <>                                                                                             \
  struct Product<channels> {                                                                              \
    static __device__ void add(float* c, u64 x, u64 w, bool more) {                                       \
      asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " more_operand ", 0;\n"                         \
                   "wgmma.mma_async.sync.aligned.m64n" #channels "k16.f32.f16.f16 {" sums "}, " x_operand \
                   ", " w_operand ", more, 1, 1, 0, 0;\n}"                                                \
                   : __VA_ARGS__                                                                          \
                   : "l"(x), "l"(w), "r"((int)more));                                                     \
    }                                                                                                     \
  };

PRODUCT(16, SUMS_8, "%8", "%9", "%10", EIGHT(0))
PRODUCT(32, SUMS_16, "%16", "%17", "%18", EIGHT(0), EIGHT(8))
PRODUCT(48, SUMS_24, "%24", "%25", "%26", EIGHT(0), EIGHT(8), EIGHT(16))
PRODUCT(64, SUMS_32, "%32", "%33", "%34", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24))
PRODUCT(80, SUMS_40, "%40", "%41", "%42", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32))

#undef PRODUCT

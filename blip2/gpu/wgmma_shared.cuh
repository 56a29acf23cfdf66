// Products of 64 rows of one matrix and ROWS of another, both in shared memory, 16 columns of each.

#pragma once

#include "wgmma.cuh"

template <int ROWS_>
struct Product;

#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define EIGHT(i) FOUR(i), FOUR(i + 4)
#define THIRTY_TWO(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24)
#define SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SUMS_16 SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_24 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_32 SUMS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_40 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SUMS_48 SUMS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SUMS_56 SUMS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SUMS_64 SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_68 SUMS_64 ", %64, %65, %66, %67"

// `a` and `b` are descriptors, of the 64 rows and of the others; with `more` the product is added to the sums c, or
// these begin with it. The numbers of the last three operands follow those of the sums.
#define PRODUCT(rows, sums, a_operand, b_operand, more_operand, ...)                                  \
  template <>                                                                                         \
  struct Product<rows> {                                                                              \
    static __device__ void add(float* c, u64 a, u64 b, bool more) {                                   \
      asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " more_operand ", 0;\n"                     \
                   "wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32.f16.f16 {" sums "}, " a_operand \
                   ", " b_operand ", more, 1, 1, 0, 0;\n}"                                            \
                   : __VA_ARGS__                                                                      \
                   : "l"(a), "l"(b), "r"((int)more));                                                 \
    }                                                                                                 \
  };

PRODUCT(16, SUMS_8, "%8", "%9", "%10", EIGHT(0))
PRODUCT(32, SUMS_16, "%16", "%17", "%18", EIGHT(0), EIGHT(8))
PRODUCT(48, SUMS_24, "%24", "%25", "%26", EIGHT(0), EIGHT(8), EIGHT(16))
PRODUCT(64, SUMS_32, "%32", "%33", "%34", THIRTY_TWO(0))
PRODUCT(80, SUMS_40, "%40", "%41", "%42", THIRTY_TWO(0), EIGHT(32))
PRODUCT(136, SUMS_68, "%68", "%69", "%70", THIRTY_TWO(0), THIRTY_TWO(32), FOUR(64))

#undef PRODUCT

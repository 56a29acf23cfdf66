// Products of 64 rows of one matrix and ROWS of another, 16 columns of each: the latter in shared memory, the former
// there too or in registers.

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
#define SUMS_72 SUMS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SUMS_80 SUMS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define SUMS_88 SUMS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SUMS_96 SUMS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SUMS_104 SUMS_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define SUMS_112 SUMS_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define SUMS_120 SUMS_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define SUMS_128 SUMS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

// `a` and `b` say where the 64 rows and the others are: a descriptor, or for `a` four registers of each thread. With
// `more` the product is added to the sums c, or these begin with it. The operands' numbers follow those of the sums.
#define PRODUCT(rows, sums, o0, o1, o2, o3, o4, o5, ...)                                                         \
  template <>                                                                                                    \
  struct Product<rows> {                                                                                         \
    static __device__ void add(float* c, u64 a, u64 b, bool more) {                                              \
      asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " o2 ", 0;\n"                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32.f16.f16 {" sums "}, " o0 ", " o1           \
                   ", more, 1, 1, 0, 0;\n}"                                                                      \
                   : __VA_ARGS__                                                                                 \
                   : "l"(a), "l"(b), "r"((int)more));                                                            \
    }                                                                                                            \
    static __device__ void add(float* c, const u32* a, u64 b, bool more) {                                       \
      asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " o5 ", 0;\n"                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32.f16.f16 {" sums "}, {" o0 ", " o1 ", " o2   \
                   ", " o3 "}, " o4 ", more, 1, 1, 0;\n}"                                                        \
                   : __VA_ARGS__                                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)more));                        \
    }                                                                                                            \
  };

PRODUCT(16, SUMS_8, "%8", "%9", "%10", "%11", "%12", "%13", EIGHT(0))
PRODUCT(32, SUMS_16, "%16", "%17", "%18", "%19", "%20", "%21", EIGHT(0), EIGHT(8))
PRODUCT(48, SUMS_24, "%24", "%25", "%26", "%27", "%28", "%29", EIGHT(0), EIGHT(8), EIGHT(16))
PRODUCT(64, SUMS_32, "%32", "%33", "%34", "%35", "%36", "%37", THIRTY_TWO(0))
PRODUCT(80, SUMS_40, "%40", "%41", "%42", "%43", "%44", "%45", THIRTY_TWO(0), EIGHT(32))
PRODUCT(96, SUMS_48, "%48", "%49", "%50", "%51", "%52", "%53", THIRTY_TWO(0), EIGHT(32), EIGHT(40))
PRODUCT(128, SUMS_64, "%64", "%65", "%66", "%67", "%68", "%69", THIRTY_TWO(0), THIRTY_TWO(32))
PRODUCT(136, SUMS_68, "%68", "%69", "%70", "%71", "%72", "%73", THIRTY_TWO(0), THIRTY_TWO(32), FOUR(64))
PRODUCT(160, SUMS_80, "%80", "%81", "%82", "%83", "%84", "%85", THIRTY_TWO(0), THIRTY_TWO(32), EIGHT(64), EIGHT(72))
PRODUCT(192, SUMS_96, "%96", "%97", "%98", "%99", "%100", "%101", THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64))
PRODUCT(224, SUMS_112, "%112", "%113", "%114", "%115", "%116", "%117", THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), EIGHT(96), EIGHT(104))
PRODUCT(256, SUMS_128, "%128", "%129", "%130", "%131", "%132", "%133", THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), THIRTY_TWO(96))

#undef PRODUCT

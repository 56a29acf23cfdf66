// One decoding step of OPT for one row, as one kernel: from the token to logits.
//
// A step reads every weight once and does little else, so what counts is that the memory never
// waits. One block on every multiprocessor runs all layers, and the blocks tell one another what a
// linear made. Weights depend on nothing: in each block a warp of its own copies them into a ring of
// DEPTH stages in shared memory (bulk copies, Hopper and later), so that those of this linear, the
// next one and the next layer's are under way whatever the blocks wait for. Plain asynchronous
// copies by all threads would do too, but block the loads of everything else.
//
// The blocks never meet at a barrier: that takes a round trip for the writes to arrive, one for the
// count and one for the reads. Each word that one block writes for others has a mark instead, a bit
// that says whether it is of this time or of the time before, and readers ask until all they read
// has it. A word is overwritten only by a block that has read, directly or through others, something
// that all of its readers wrote later. That is why every block has a share of qkv and of fc.
//
// A linear's tiles of 16 channels are dealt out to the blocks, and the inputs of a tile to a
// block's warps. Where tiles are few for the number of blocks (dense, proj) a tile may be shared by
// several blocks: each leaves its part of the sum in a slot of its own, and all who read add up the
// slots in the same order. So results never depend on timing. Each block keeps the residual stream
// in its registers, and normalises it for itself.
//
// Compiled by NVRTC with BITS, HEAD_BITS, WARPS, BLOCKS, STAGE, DEPTH, UNDER_WAY, SHARED, WIDTH, FFN,
// HEADS, LAYERS and VOCAB defined; fused_step.py says how they are chosen. WIDTH / 64 and FFN / 64
// are multiples of WARPS, VOCAB of 16 where the head has 16 bits.

#define HEAD_SIZE (WIDTH / HEADS)

#include "fragments.cuh"
#include "heads.cuh"

#define THREADS (32 * WARPS)
#define OWN ((WIDTH / 4 + THREADS - 1) / THREADS)  // fours of the residual stream a thread keeps

struct Linear {
  const char* weight;
  const u16 *scales, *bias;
};

struct Norm {
  const u16 *weight, *bias;
};

struct Layer {
  Linear qkv, dense, fc, proj;
  Norm input_norm, post_norm;
};

struct Model {  // the table of addresses that fused_step.py makes
  Layer layers[LAYERS];
  Linear head;
  Norm final_norm;
  const u16 *embedding, *positions;
};

enum { QKV, DENSE, FC, PROJ, HEAD };

__host__ __device__ constexpr int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

template <int WHICH>
struct Shape {
  static constexpr int bits = WHICH == HEAD ? HEAD_BITS : BITS;
  static constexpr int K = WHICH == PROJ ? FFN : WIDTH;
  static constexpr int N = WHICH == QKV ? 3 * WIDTH : WHICH == FC ? FFN : WHICH == HEAD ? VOCAB : WIDTH;
  static constexpr int TILES = (N + CHANNELS - 1) / CHANNELS;
  // A slab is what a block multiplies at a time: 64 inputs for each warp, of one tile.
  static constexpr int SLABS = K / 64 / WARPS;  // of a tile
  static constexpr int LOADS = bits / 4;        // of 16 bytes, a thread's
  // Slabs copied at a time, of one tile.
  static constexpr int GANG = bits == 16 ? 1 : common_divisor(STAGE / bits, SLABS);
  static constexpr bool SPLIT = WHICH == DENSE || WHICH == PROJ;
  static constexpr int DEALT = SPLIT ? TILES * SLABS : TILES;
  static constexpr int SHARERS = DEALT < BLOCKS ? DEALT : BLOCKS;

  static __device__ int first_slab(int block) {
    int dealt = min(block, SHARERS) * DEALT / SHARERS;
    return SPLIT ? dealt : dealt * SLABS;
  }

  static __device__ int block_of(int slab) { return ((slab + 1) * SHARERS - 1) / DEALT; }  // SPLIT
};

__host__ __device__ constexpr int most_slots(int tiles, int slabs, int blocks) {
  int sharers = tiles * slabs < blocks ? tiles * slabs : blocks;
  int most = (sharers + tiles - 1) / tiles + 1;
  return most < slabs ? most : slabs;
}
// As many for both, as they take turns in the slots: what one of them left unwritten would still have
// the other's mark of the layer before.
constexpr int DENSE_SLOTS = most_slots(Shape<DENSE>::TILES, Shape<DENSE>::SLABS, BLOCKS);
constexpr int PROJ_SLOTS = most_slots(Shape<PROJ>::TILES, Shape<PROJ>::SLABS, BLOCKS);
constexpr int SLOTS = DENSE_SLOTS < PROJ_SLOTS ? PROJ_SLOTS : DENSE_SLOTS;
constexpr int CHUNK = THREADS / CHANNELS < 8 ? THREADS / CHANNELS : 8;  // tiles summed up at a time

// ---- Weights, copied far ahead

constexpr int PITCH16 = WARPS * 128 + 64;  // of a slab's rows in 16 bits: 64 bytes apart in banks
__host__ __device__ constexpr int slab_bytes(int bits) {
  return bits == 16 ? CHANNELS * PITCH16 : WARPS * 128 * bits;
}
constexpr int STAGE_BYTES = BITS == 16 || HEAD_BITS == 16 ? slab_bytes(16) : WARPS * 128 * STAGE;

// Where a warp is in the ring, and the barriers that say which stages are full and which empty.
struct Ring {
  u32 stages, full, empty;  // shared memory addresses
  int stage = 0, phase = 0;
  unsigned long long once;  // the L2 cache may forget weights first: what blocks tell and all else stays

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
    if (S::bits == 16)
      ring.copy(linear.weight + (tile * CHANNELS * S::K + part * WARPS * 64) * 2, CHANNELS,
                WARPS * 128, S::K * 2, PITCH16);
    else  // one slab behind the other
      ring.copy(linear.weight + (tile * S::SLABS + part) * slab_bytes(S::bits), 1,
                (next - slab) * slab_bytes(S::bits), 0, 0);
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

// A thread's weights of a full slab: for each 32 inputs those of its near and its far channel.
template <int WHICH>
__device__ inline void read_slab(u32 slab, uint4* w) {
  using S = Shape<WHICH>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 at = S::bits == 16 ? slab + lane / 4 * PITCH16 + warp * 128 + lane % 4 * 16
                         : slab + warp * (S::LOADS * 512) + lane * 16;
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[i].x), "=r"(w[i].y), "=r"(w[i].z), "=r"(w[i].w)
                 : "r"(at + (S::bits == 16 ? i / 2 * 64 + i % 2 * 8 * PITCH16 : i * 512)));
}

// ---- What the threads and the blocks tell one another

__device__ inline void sync() {  // all warps but the copying one
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A word's mark is the lowest bit of a float, or the signs of two halves that are never negative.
constexpr u32 FLOAT_MARK = 1, HALVES_MARK = 0x80008000;

__device__ constexpr u32 mark_of(const float*) { return FLOAT_MARK; }
__device__ constexpr u32 mark_of(const u16*) { return HALVES_MARK; }

__device__ inline void tell(float* at, float value, u32 mark) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at),
               "r"(__float_as_uint(value) & ~FLOAT_MARK | mark)
               : "memory");
}

__device__ inline void tell(u16* at, u16 value, u32 mark) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(at), "h"((u16)(value & 0x7fff | mark << 15))
               : "memory");
}

// Reads COUNT times 16 bytes, those i for which asked(i), from at(i), once all are marked so, and
// takes the marks off.
template <int COUNT, typename Asked, typename At>
__device__ inline void hear(uint4 (&words)[COUNT], u32 mark, Asked asked, At at) {
  constexpr u32 MARK = mark_of(decltype(at(0)){});
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

__device__ inline float hear(const float* at, u32 mark) {
  u32 word;
  do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  while ((word & FLOAT_MARK) != mark);
  return __uint_as_float(word & ~FLOAT_MARK);
}

// ---- Inputs of the linears, in shared memory

struct Fours {  // of three vectors as wide as the residual stream, in float16
  uint2 weight[OWN], bias[OWN], added[OWN];
};

// Where each block begins to read what all read, lest all ask for the same at a time.
template <int COUNT>
__device__ inline int rotated(int i) {
  i += blockIdx.x * (COUNT / BLOCKS);
  return i < COUNT ? i : i - COUNT;
}

__device__ inline bool has(int i) { return threadIdx.x + i * THREADS < WIDTH / 4; }  // whether an i-th four

__device__ inline int own(int i) { return 4 * rotated<WIDTH / 4>(threadIdx.x + i * THREADS); }

__device__ inline Fours fours(const Norm& norm, const u16* added) {
  Fours f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!has(i)) continue;
    f.weight[i] = *(const uint2*)(norm.weight + own(i));
    f.bias[i] = *(const uint2*)(norm.bias + own(i));
    f.added[i] = added ? *(const uint2*)(added + own(i)) : uint2{0, 0};
  }
  return f;
}

struct Stream {  // the residual stream, each thread's fours of it
  float x[OWN][4];

  // Adds what dense or proj made.
  __device__ void add(const float* slots, u32 mark, const Fours& f) {
    uint4 parts[OWN * SLOTS];
    hear(
        parts, mark, [](int i) { return has(i / SLOTS); },
        [&](int i) { return slots + i % SLOTS * WIDTH + own(i / SLOTS); });
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      if (!has(i)) continue;
      float sums[4];
      spread(f.added[i], sums);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const uint4& part = parts[i * SLOTS + s];
        sums[0] += __uint_as_float(part.x), sums[1] += __uint_as_float(part.y);
        sums[2] += __uint_as_float(part.z), sums[3] += __uint_as_float(part.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] += sums[j];
    }
  }

  // Lays its LayerNorm out as inputs. A warp finds the mean and the squares about it for itself;
  // what they are for all follows from those.
  __device__ void stage_norm(const Fours& f, u16* input, float2* scratch) const {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (has(i))
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += x[i][j];
    sum = warp_sum(sum);
    float mean = __fdividef(sum, max(1, count(threadIdx.x / 32)));
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (has(i))
#pragma unroll
        for (int j = 0; j < 4; ++j) squares += (x[i][j] - mean) * (x[i][j] - mean);
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = {sum, squares};
    sync();
    float2 of_warp[WARPS];
    sum = squares = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      of_warp[warp] = scratch[warp];
      sum += of_warp[warp].x;
    }
    mean = sum / WIDTH;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      float away = of_warp[warp].x - count(warp) * mean;  // the warp's mean's distance, count times
      squares += of_warp[warp].y + __fdividef(away * away, max(1, count(warp)));
    }
    float scale = rsqrtf(squares / WIDTH + 1e-5f);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      if (!has(i)) continue;
      float weight[4], bias[4], normed[4];
      spread(f.weight[i], weight);
      spread(f.bias[i], bias);
#pragma unroll
      for (int j = 0; j < 4; ++j) normed[j] = (x[i][j] - mean) * scale * weight[j] + bias[j];
      *(uint2*)(input + own(i)) = gather(normed);
    }
    sync();
  }

  // How many numbers of the stream a warp has.
  static __device__ constexpr int count(int warp) {
    if (WIDTH / 4 % THREADS == 0) return WIDTH / WARPS;
    int fours = 0;
    for (int i = 0; i < OWN; ++i) {
      int left = WIDTH / 4 - i * THREADS - warp * 32;
      fours += left < 0 ? 0 : left < 32 ? left : 32;
    }
    return 4 * fours;
  }
};

__device__ inline void lay_out(u16* at, const uint4& words, const float*) {
  *(uint2*)at = gather((const float*)&words);
}

__device__ inline void lay_out(u16* at, const uint4& words, const u16*) { *(uint4*)at = words; }

// Lays out what other blocks told.
template <int INPUTS, typename Told>
__device__ inline void stage(const Told* from, u16* input, u32 mark) {
  constexpr int EACH = 16 / sizeof(Told), LOADS = INPUTS / EACH;  // inputs of a load, and loads
  constexpr int MINE = (LOADS + THREADS - 1) / THREADS;
  auto asked = [](int i) { return threadIdx.x + i * THREADS < LOADS; };
  auto place = [](int i) { return EACH * rotated<LOADS>(threadIdx.x + i * THREADS); };
  uint4 words[MINE];
  hear(words, mark, asked, [&](int i) { return from + place(i); });
#pragma unroll
  for (int i = 0; i < MINE; ++i)
    if (asked(i)) lay_out(input + place(i), words[i], from);
  sync();
}

// ---- Linears

// Packed weights are multiplied as they are: a byte or nibble n alone is the float16 n / 2^24, an
// upper nibble 16 n / 2^24. What they are biased by is taken off by way of the inputs' sum.
template <int bits>
struct Packed {
  static constexpr float UNIT = bits == 16 ? 1.0f : 16777216.0f;
  static constexpr float BIAS = bits == 16 ? 0.0f : (1 << (bits - 1)) / UNIT;

  // sums += a slab's products; for 4 bits the last two of them 16 times too large.
  static __device__ void multiply(float (*sums)[4], const uint4* w, const uint4* inputs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 x = inputs[4 * half];  // 32 inputs on
      if constexpr (bits == 16) {
        const uint4 &near = w[2 * half], &far = w[2 * half + 1];
        mma(sums[2 * half], near.x, far.x, near.y, far.y, x.x, x.y);
        mma(sums[2 * half + 1], near.z, far.z, near.w, far.w, x.z, x.w);
      } else if constexpr (bits == 8) {
        const uint4& q = w[half];
        mma(sums[2 * half], low(q.x), low(q.z), high(q.x), high(q.z), x.x, x.y);
        mma(sums[2 * half + 1], low(q.y), low(q.w), high(q.y), high(q.w), x.z, x.w);
      } else {
        u32 near = half ? w[0].z : w[0].x, far = half ? w[0].w : w[0].y;
        u32 near_later = near >> 8, far_later = far >> 8;
        const u32 low = 0x000f000f, high = 0x00f000f0;
        mma(sums[half], near & low, far & low, near_later & low, far_later & low, x.x, x.z);
        mma(sums[2 + half], near & high, far & high, near_later & high, far_later & high, x.y, x.w);
      }
    }
  }

  static __device__ u32 low(u32 q) { return __byte_perm(q, 0, 0x4140); }
  static __device__ u32 high(u32 q) { return __byte_perm(q, 0, 0x4342); }

  static __device__ float total(float (*sums)[4], int i) {
    float last = sums[2][i] + sums[3][i];
    return sums[0][i] + sums[1][i] + (bits == 4 ? last / 16 : last);
  }
};

// Sums a block's slabs [slab, end) of at most CHUNK tiles; thread o gets output o of them, in units
// of 1 / UNIT.
template <int WHICH>
__device__ inline float product(Ring& ring, const u16* input, float* partial, int slab, int end) {
  using S = Shape<WHICH>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u16* x = input + warp * 64 + lane % 4 * 8;  // the same row for all eight columns of an mma
  const u16* pair = input + warp * 64 + lane * 2;   // a lane's share of the inputs' sum
  auto pair_sum = [&](int slab) {
    u32 two = *(const u32*)(pair + slab * (WARPS * 64));
    return half_to_float(two) + half_to_float(two >> 16);
  };
  float inputs = 0;
  if (S::bits < 16 && !S::SPLIT) {  // the same for all tiles
#pragma unroll
    for (int i = 0; i < S::SLABS; ++i) inputs += pair_sum(i);
    inputs = warp_sum(inputs);
  }
  float* part = partial + warp * CHANNELS;
  int in_tile = slab % S::SLABS;
#pragma unroll 1
  while (slab < end) {
    int last = min(S::SLABS, in_tile + end - slab);
    slab += last - in_tile;
    float sums[4][4] = {};
#pragma unroll(S::GANG == 1 ? 2 : 1)
    while (in_tile < last) {
      int count = S::SPLIT ? min(S::GANG - in_tile % S::GANG, last - in_tile) : S::GANG;
      uint4 w[S::GANG][S::LOADS];
      u32 stage = ring.wait_full();
#pragma unroll
      for (int i = 0; i < S::GANG; ++i)
        if (i < count) read_slab<WHICH>(stage + i * slab_bytes(S::bits), w[i]);
      ring.release();
#pragma unroll
      for (int i = 0; i < S::GANG; ++i)
        if (i < count) {
          Packed<S::bits>::multiply(sums, w[i], (const uint4*)(x + (in_tile + i) * (WARPS * 64)));
          if (S::bits < 16 && S::SPLIT) inputs += pair_sum(in_tile + i);
        }
      in_tile += count;
    }
    if (S::bits < 16 && S::SPLIT) inputs = warp_sum(inputs);
    if (lane % 4 == 0) {
      part[lane / 4] = Packed<S::bits>::total(sums, 0) - Packed<S::bits>::BIAS * inputs;
      part[lane / 4 + 8] = Packed<S::bits>::total(sums, 2) - Packed<S::bits>::BIAS * inputs;
    }
    if (S::SPLIT) inputs = 0;
    part += WARPS * CHANNELS;
    in_tile = 0;
  }
  sync();
  const float* parts = partial + threadIdx.x / CHANNELS * (WARPS * CHANNELS) + threadIdx.x % CHANNELS;
  float sum = 0;
  if (threadIdx.x < CHUNK * CHANNELS)
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += parts[other * CHANNELS];
  return sum;
}

template <int WHICH>
__device__ inline float scale_of(const Linear& linear, int channel) {
  using S = Shape<WHICH>;
  return S::bits < 16 ? half_to_float(linear.scales[min(channel, S::N - 1)]) * Packed<S::bits>::UNIT : 1.0f;
}

// A linear whose tiles belong to one block each: store(channel, value) is called for each of the
// block's outputs. The scale and bias of the first chunk are read by `before`, early.
template <int WHICH>
struct Whole {
  using S = Shape<WHICH>;
  float scale, bias;

  __device__ void before(const Linear& linear) { before(linear, S::first_slab(blockIdx.x) / S::SLABS); }

  __device__ void before(const Linear& linear, int tile) {
    int channel = tile * CHANNELS + threadIdx.x;
    scale = scale_of<WHICH>(linear, channel);
    bias = linear.bias ? half_to_float(linear.bias[min(channel, S::N - 1)]) : 0.0f;
  }

  template <typename Store>
  __device__ void run(Ring& ring, const Linear& linear, const u16* input, float* partial, Store store) {
    int tile = S::first_slab(blockIdx.x) / S::SLABS, last = S::first_slab(blockIdx.x + 1) / S::SLABS;
#pragma unroll 1
    while (tile < last) {
      int end = min(tile + CHUNK, last);
      float sum = product<WHICH>(ring, input, partial, tile * S::SLABS, end * S::SLABS);
      int channel = tile * CHANNELS + threadIdx.x;
      if (channel < min(end * CHANNELS, S::N)) store(channel, sum * scale + bias);
      tile = end;
      if (tile == last) break;
      before(linear, tile);
      sync();  // the sums were read: partial may be written again
    }
  }
};

// A linear whose tiles may be shared among blocks: parts of sums go to slots, SLOTS x WIDTH.
template <int WHICH>
struct Split {
  using S = Shape<WHICH>;
  float scale;

  __device__ void before(const Linear& linear) {
    scale = scale_of<WHICH>(linear, S::first_slab(blockIdx.x) / S::SLABS * CHANNELS + threadIdx.x);
  }

  __device__ void run(Ring& ring, const u16* input, float* partial, float* slots, u32 mark) {
    int slab = S::first_slab(blockIdx.x), end = S::first_slab(blockIdx.x + 1);
    if (slab == end) return;  // the same for a whole block
    float sum = product<WHICH>(ring, input, partial, slab, end);
    int channel = slab / S::SLABS * CHANNELS + threadIdx.x;
    int tile = channel / CHANNELS, last = tile * S::SLABS + S::SLABS - 1;
    if (channel >= ((end - 1) / S::SLABS + 1) * CHANNELS) return;
    int slot = blockIdx.x - S::block_of(tile * S::SLABS);
    tell(slots + slot * WIDTH + channel, sum * scale, mark);
    if (end > last)  // the last to share the tile
      for (++slot; slot < SLOTS; ++slot) tell(slots + slot * WIDTH + channel, 0.0f, mark);
  }
};

// ---- Attention

#define PASS (WARPS * ABREAST)      // slots that a block attends to at a time
#define EARLY (PASS >= 60 ? 1 : 2)  // passes whose keys and values are read ahead

struct Attention {
  u16 *keys, *values;  // of the layer: HEADS x max_len x HEAD_SIZE
  int max_len, length;
  uint4 key[EARLY], value[EARLY];

  static __device__ int slot_of(int pass) {
    int lane = threadIdx.x % 32;
    return pass * PASS + threadIdx.x / 32 * ABREAST + min(lane / PIECES, ABREAST - 1);
  }

  __device__ void read(int head, int slot, uint4& k, uint4& v) const {
    k = v = uint4{0, 0, 0, 0};
    if (slot >= length || head >= HEADS) return;
    long long at = ((long long)head * max_len + slot) * HEAD_SIZE + threadIdx.x % 32 % PIECES * 8;
    k = *(const uint4*)(keys + at);
    v = *(const uint4*)(values + at);
  }

  // What is known before the query is.
  __device__ void before(int head) {
#pragma unroll
    for (int pass = 0; pass < EARLY; ++pass) read(head, slot_of(pass), key[pass], value[pass]);
  }

  // Each group of PIECES lanes keeps an online softmax of its slots.
  struct Mix {
    float highest = -1e30f, weight = 0, mixed[8] = {};

    __device__ void add(float score, const float* v) {
      float higher = fmaxf(highest, score), fade = __expf(highest - higher), w = __expf(score - higher);
      highest = higher;
      weight = weight * fade + w;
#pragma unroll
      for (int j = 0; j < 8; ++j) mixed[j] = mixed[j] * fade + w * v[j];
    }
  };

  // `own`: the new token's key, and HEAD_SIZE on its value.
  __device__ void attend(Mix& mix, const float (&query)[8], const u16* own, int slot, uint4 key,
                         uint4 value) const {
    if (slot == length) key = *(const uint4*)own, value = *(const uint4*)(own + HEAD_SIZE);
    float k[8], v[8], score = 0;
    spread({key.x, key.y}, k), spread({key.z, key.w}, k + 4);
    spread({value.x, value.y}, v), spread({value.z, value.w}, v + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) score += k[j] * query[j];
    score = piece_sum(score);
    mix.add(slot <= length ? score : -1e30f, v);
  }

  __device__ void run(const float* qkv, float* attended, float* scratch, u32 mark) {
    float *whole_query = scratch, *mixed = whole_query + HEAD_SIZE;
    float *highest = mixed + WARPS * HEAD_SIZE, *weight = highest + WARPS;
    u16* whole_own = (u16*)(weight + WARPS + WARPS % 2 * 2);  // aligned to 16 bytes
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, piece = lane % PIECES * 8;
    const u16* own = whole_own + piece;
#pragma unroll 1
    for (int head = blockIdx.x; head < HEADS; head += BLOCKS) {
      if (head != blockIdx.x) before(head);
      for (int i = threadIdx.x; i < 3 * HEAD_SIZE; i += THREADS) {
        int which = i / HEAD_SIZE, d = i % HEAD_SIZE;
        u16 half = float_to_half(hear(qkv + (which * HEADS + head) * HEAD_SIZE + d, mark));
        long long slot = ((long long)head * max_len + length) * HEAD_SIZE + d;
        if (which == 0)
          whole_query[d] = half_to_float(half) * rsqrtf(HEAD_SIZE);
        else
          whole_own[i - HEAD_SIZE] = (which == 1 ? keys : values)[slot] = half;
      }
      sync();
      float query[8];
      *(float4*)query = *(const float4*)(whole_query + piece);
      *(float4*)(query + 4) = *(const float4*)(whole_query + piece + 4);

      Mix mix;
#pragma unroll
      for (int pass = 0; pass < EARLY; ++pass)
        attend(mix, query, own, slot_of(pass), key[pass], value[pass]);
#pragma unroll 1
      for (int pass = EARLY; pass * PASS <= length; ++pass) {
        uint4 k, v;
        read(head, slot_of(pass), k, v);
        attend(mix, query, own, slot_of(pass), k, v);
      }
      // The groups of a warp, then the warps.
      float best = mix.highest;
#pragma unroll
      for (int other = 1; other < ABREAST; ++other)
        best = fmaxf(best, __shfl_sync(~0u, mix.highest, (lane + other * PIECES) % (ABREAST * PIECES)));
      float fade = lane < ABREAST * PIECES ? __expf(mix.highest - best) : 0;
      mix.weight *= fade;
#pragma unroll
      for (int j = 0; j < 8; ++j) mix.mixed[j] *= fade;
      float total = mix.weight, sums[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] = mix.mixed[j];
#pragma unroll
      for (int other = 1; other < ABREAST; ++other) {
        int from = lane % PIECES + other * PIECES;
        total += __shfl_sync(~0u, mix.weight, from);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j] += __shfl_sync(~0u, mix.mixed[j], from);
      }
      if (lane < PIECES)
#pragma unroll
        for (int j = 0; j < 8; ++j) mixed[warp * HEAD_SIZE + lane * 8 + j] = sums[j];
      if (lane == 0) highest[warp] = best, weight[warp] = total;
      sync();
      if (threadIdx.x < HEAD_SIZE) {
        float all = -1e30f, sum = 0, norm = 0;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) all = fmaxf(all, highest[other]);
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
          float fade = __expf(highest[other] - all);
          norm += fade * weight[other];
          sum += fade * mixed[other * HEAD_SIZE + threadIdx.x];
        }
        tell(attended + head * HEAD_SIZE + threadIdx.x, sum / norm, mark);
      }
      sync();  // scratch is read: the next head, or what is laid out next, may be written there
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    step(const Model* addresses, const long long* token, long long* row_length, u16* keys, u16* values,
         float* qkv, float* attended, u16* hidden, float* slots, float* logits, u32* first_mark,
         int max_len) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Model model;
  __shared__ float2 scratch[WARPS];
  __shared__ __align__(8) long long ring_barriers[2 * DEPTH];
  u16* input = (u16*)(shared + DEPTH * STAGE_BYTES);  // and attention's scratch
  float* partial = (float*)(shared + SHARED) - CHUNK * WARPS * CHANNELS;

  Ring ring(shared, ring_barriers);
  if (threadIdx.x == 0) ring.prepare();
  for (int i = threadIdx.x; i < sizeof(Model) / 8; i += blockDim.x)
    ((long long*)&model)[i] = ((const long long*)addresses)[i];
  __syncthreads();
  if (threadIdx.x >= THREADS) return copy_weights(ring, model);

  int length = *row_length;
  u32 mark = *first_mark;
  Attention attention{keys, values, max_len, length};

  Stream stream;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!has(i)) continue;
    float word[4], place[4];
    spread(*(const uint2*)(model.embedding + *token * WIDTH + own(i)), word);
    spread(*(const uint2*)(model.positions + (long long)length * WIDTH + own(i)), place);
#pragma unroll
    for (int j = 0; j < 4; ++j) stream.x[i][j] = word[j] + place[j];
  }

  // The parts of dense and of proj take turns in the slots, with one mark each.
  const u32 dense_mark = 1, proj_mark = 0;
  Fours f = fours(model.layers[0].input_norm, nullptr);
#pragma unroll 1
  for (int index = 0; index < LAYERS; ++index, mark ^= 1) {
    const Layer& layer = model.layers[index];
    Whole<QKV> qkv_linear;
    qkv_linear.before(layer.qkv);
    if (index) stream.add(slots, proj_mark, f);
    stream.stage_norm(f, input, scratch);
    qkv_linear.run(ring, layer.qkv, input, partial, [&](int channel, float y) {
      tell(qkv + channel, y, mark);
    });
    attention.before(blockIdx.x);
    attention.run(qkv, attended, (float*)input, mark);
    attention.keys += (long long)HEADS * max_len * HEAD_SIZE;
    attention.values += (long long)HEADS * max_len * HEAD_SIZE;
    Split<DENSE> dense;
    dense.before(layer.dense);
    f = fours(layer.post_norm, layer.dense.bias);
    stage<WIDTH>(attended, input, mark);
    dense.run(ring, input, partial, slots, dense_mark);
    Whole<FC> fc;
    fc.before(layer.fc);
    stream.add(slots, dense_mark, f);
    stream.stage_norm(f, input, scratch);
    fc.run(ring, layer.fc, input, partial, [&](int channel, float y) {
      tell(hidden + channel, float_to_half(fmaxf(y, 0.0f)), mark);
    });
    Split<PROJ> proj;
    proj.before(layer.proj);
    f = fours(index + 1 < LAYERS ? model.layers[index + 1].input_norm : model.final_norm, layer.proj.bias);
    stage<FFN>(hidden, input, mark);
    proj.run(ring, input, partial, slots, proj_mark);
  }

  Whole<HEAD> head;
  head.before(model.head);
  stream.add(slots, proj_mark, f);
  // All blocks have read the length and the first mark: they had a share of this sum.
  if (blockIdx.x == 0 && threadIdx.x == 0) *row_length = length + 1, *first_mark = mark;
  stream.stage_norm(f, input, scratch);
  head.run(ring, model.head, input, partial, [&](int channel, float y) { logits[channel] = y; });
}

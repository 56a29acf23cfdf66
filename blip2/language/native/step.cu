// One decoding step of OPT for up to 8 rows, as one kernel: from tokens to logits.
//
// A step reads every weight once and does little else, so what counts is that the memory never
// waits. One block on every multiprocessor runs all layers, with a barrier between the blocks where
// one linear needs what another made. Weights depend on nothing: in each block a warp of its own
// copies them into a ring of DEPTH stages in shared memory (bulk copies, Hopper and later), so that
// those of this linear, the next one and the next layer's are under way across all barriers. Plain
// asynchronous copies by all threads would do too, but block the loads of everything else.
//
// A linear's tiles of 16 channels are dealt out to the blocks, and the inputs of a tile to a
// block's warps. Where tiles are few for the number of blocks (dense, proj) a tile may be shared by
// several blocks: each leaves its part of the sum in a slot of its own, and all who read add up the
// slots in the same order. So results never depend on timing. Each block keeps the residual stream
// in its registers, and normalises it for itself.
//
// Compiled by NVRTC with ROWS, BITS, HEAD_BITS, WARPS, BLOCKS, DEPTH, SHARED, WIDTH, FFN, HEADS,
// LAYERS and VOCAB defined; step.py says how they are chosen. WIDTH / 64 and FFN / 64 are multiples
// of WARPS, VOCAB of 16.

#define HEAD_SIZE (WIDTH / HEADS)

#include "fragments.cuh"
#include "heads.cuh"

#define THREADS (32 * WARPS)
#define OWN ((WIDTH / 4 + THREADS - 1) / THREADS)  // fours of the residual stream a thread keeps
#define PITCH(inputs) (inputs + 32)                // of a row of inputs: rows 64 bytes apart in banks

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

struct Model {  // the table of addresses that step.py makes
  Layer layers[LAYERS];
  Linear head;
  Norm final_norm;
  const u16 *embedding, *positions;
};

enum { QKV, DENSE, FC, PROJ, HEAD };

template <int WHICH>
struct Shape {
  static constexpr int bits = WHICH == HEAD ? HEAD_BITS : BITS;
  static constexpr int K = WHICH == PROJ ? FFN : WIDTH;
  static constexpr int N = WHICH == QKV ? 3 * WIDTH : WHICH == FC ? FFN : WHICH == HEAD ? VOCAB : WIDTH;
  static constexpr int TILES = (N + CHANNELS - 1) / CHANNELS;
  // A slab is what a block multiplies at a time: 64 inputs for each warp, of one tile.
  static constexpr int SLABS = K / 64 / WARPS;  // of a tile
  static constexpr int LOADS = bits / 4;        // of 16 bytes, a thread's
  static constexpr int GANG = bits == 16 ? 1 : STAGE / bits;  // slabs copied at a time
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
constexpr int DENSE_SLOTS = most_slots(Shape<DENSE>::TILES, Shape<DENSE>::SLABS, BLOCKS);
constexpr int PROJ_SLOTS = most_slots(Shape<PROJ>::TILES, Shape<PROJ>::SLABS, BLOCKS);
constexpr int SLOTS = DENSE_SLOTS > PROJ_SLOTS ? DENSE_SLOTS : PROJ_SLOTS;
constexpr int CHUNK = THREADS / (CHANNELS * ROWS) < 8 ? THREADS / (CHANNELS * ROWS) : 8;  // tiles summed up at a time

// ---- Weights, copied far ahead

constexpr int PITCH16 = WARPS * 128 + 64;  // of a slab's rows in 16 bits: 64 bytes apart in banks
__host__ __device__ constexpr int slab_bytes(int bits) {
  return bits == 16 ? CHANNELS * PITCH16 : WARPS * 128 * bits;
}
constexpr int STAGE_BYTES = BITS == 16 || HEAD_BITS == 16 ? slab_bytes(16) : WARPS * 128 * STAGE;

// Where a warp is in the ring, and the barriers that say which slabs are full and which empty.
struct Ring {
  u32 stages, full, empty;  // shared memory addresses
  int stage = 0, phase = 0;
  int used = 0;  // slabs of the stage, by this warp

  __device__ Ring(const void* stages, const void* barriers)
      : stages((u32)__cvta_generic_to_shared(stages)), full((u32)__cvta_generic_to_shared(barriers)),
        empty(full + 8 * DEPTH) {}

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

  // The address of the next slab, of `bytes` bytes, once it is there.
  __device__ u32 wait_slab(int bytes) const {
    if (used == 0) wait(full + 8 * stage, phase);
    return stages + stage * STAGE_BYTES + used * bytes;
  }

  // By a whole warp, when it has read its part of a slab: `last` is whether the stage ends there.
  __device__ void release_slab(int gang, bool last) {
    if (++used < gang && !last) return;
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty + 8 * stage) : "memory");
    used = 0;
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
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              stages + stage * STAGE_BYTES + lane * pitch),
          "l"(from + (long long)lane * stride), "r"(bytes), "r"(barrier)
          : "memory");
    next();
  }
};

template <int WHICH>
__device__ inline void copy_linear(Ring& ring, const Linear& linear) {
  using S = Shape<WHICH>;
  int slab = S::first_slab(blockIdx.x), end = S::first_slab(blockIdx.x + 1);
  for (; slab < end; slab += S::GANG) {
    long long tile = slab / S::SLABS;
    int part = slab % S::SLABS;
    if (S::bits == 16)
      ring.copy(linear.weight + (tile * CHANNELS * S::K + part * WARPS * 64) * 2, CHANNELS,
                WARPS * 128, S::K * 2, PITCH16);
    else  // one slab behind the other, also from tile to tile
      ring.copy(linear.weight + (tile * S::SLABS + part) * slab_bytes(S::bits), 1,
                min(S::GANG, end - slab) * slab_bytes(S::bits), 0, 0);
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

struct Barrier {
  u32* arrived;
  u32 target;

  __device__ void arrive() {
    sync();
    target += BLOCKS;
    if (threadIdx.x == 0)
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
  }

  __device__ void wait() {
    if (threadIdx.x == 0) {
      u32 seen;
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
      while (seen < target);
    }
    sync();
  }
};

// Reads of what other blocks wrote go past the L1 cache.
__device__ inline uint4 load16(const void* at) { return __ldcg((const uint4*)at); }
__device__ inline float4 load4(const float* at) { return __ldcg((const float4*)at); }
__device__ inline u16 load_half(const u16* at) { return __ldcg(at); }

// ---- Inputs of the linears, in shared memory

struct Stream {  // the residual stream, each thread's fours of it
  float x[ROWS][OWN][4];
};

struct Fours {  // of three vectors as wide as the stream, in float16
  uint2 weight[OWN], bias[OWN], added[OWN];
};

__device__ inline int own(int i) { return 4 * (threadIdx.x + i * THREADS); }

__device__ inline Fours fours(const Norm& norm, const u16* added) {
  Fours f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (own(i) >= WIDTH) continue;
    f.weight[i] = *(const uint2*)(norm.weight + own(i));
    f.bias[i] = *(const uint2*)(norm.bias + own(i));
    f.added[i] = added ? *(const uint2*)(added + own(i)) : uint2{0, 0};
  }
  return f;
}

// The sums over a block of one value a row, in every thread.
__device__ inline void block_sums(float (&sums)[ROWS], float* scratch) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], offset);
    if (threadIdx.x % 32 == 0) scratch[r * WARPS + threadIdx.x / 32] = sums[r];
  }
  sync();
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sums[r] += scratch[r * WARPS + warp];
  }
}

// Adds what dense or proj made to the stream, and lays its LayerNorm out as inputs.
__device__ inline void stage_norm(Stream& stream, const float* slots, int num_slots, const Fours& f,
                                  u16* input, float* scratch) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (own(i) >= WIDTH) continue;
    float added[4];
    spread(f.added[i], added);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float4 parts[SLOTS];
#pragma unroll
      for (int s = 0; s < SLOTS; ++s)
        if (s < num_slots) parts[s] = load4(slots + (s * ROWS + r) * WIDTH + own(i));
      float* x = stream.x[r][i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float sum = added[j];
#pragma unroll
        for (int s = 0; s < SLOTS; ++s)
          if (s < num_slots) sum += ((const float*)&parts[s])[j];
        x[j] += sum;
      }
    }
  }
  float sums[ROWS], squares[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (own(i) < WIDTH)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r] += stream.x[r][i][j];
  }
  block_sums(sums, scratch);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    squares[r] = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (own(i) < WIDTH)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float centred = stream.x[r][i][j] - sums[r] / WIDTH;
          squares[r] += centred * centred;
        }
  }
  block_sums(squares, scratch + ROWS * WARPS);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (own(i) >= WIDTH) continue;
    float weight[4], bias[4];
    spread(f.weight[i], weight);
    spread(f.bias[i], bias);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float scale = rsqrtf(squares[r] / WIDTH + 1e-5f), normed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        normed[j] = (stream.x[r][i][j] - sums[r] / WIDTH) * scale * weight[j] + bias[j];
      *(uint2*)(input + r * PITCH(WIDTH) + own(i)) = gather(normed);
    }
  }
  sync();
}

// Where each block begins to read what all read, lest all ask for the same at a time.
template <int COUNT>
__device__ inline int rotated(int i) {
  i += blockIdx.x * (COUNT / BLOCKS);
  return i < COUNT ? i : i - COUNT;
}

// Lays out what other blocks wrote.
template <int INPUTS>
__device__ inline void stage(const u16* from, u16* input) {
  constexpr int EACH = (ROWS * INPUTS / 8 + THREADS - 1) / THREADS;
  uint4 read[EACH];  // all at once: what counts is the latency
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    int k = rotated<ROWS * INPUTS / 8>(threadIdx.x + i * THREADS) * 8;
    if (threadIdx.x + i * THREADS < ROWS * INPUTS / 8) read[i] = load16(from + k);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    int k = rotated<ROWS * INPUTS / 8>(threadIdx.x + i * THREADS) * 8;
    if (threadIdx.x + i * THREADS < ROWS * INPUTS / 8) *(uint4*)(input + k / INPUTS * PITCH(INPUTS) + k % INPUTS) = read[i];
  }
  sync();
}

// ---- Linears

// Sums a block's slabs [slab, end) of at most CHUNK tiles; thread o gets output o of them, which is
// channel o / ROWS % 16 of tile o / ROWS / 16 for row o % ROWS.
template <int WHICH>
__device__ inline float product(Ring& ring, const u16* input, float* partial, int slab, int end) {
  using S = Shape<WHICH>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u16* x = input + min(g, ROWS - 1) * PITCH(S::K) + warp * 64 + t * 8;
  float* part = partial + warp * CHANNELS * ROWS;
  int in_tile = slab % S::SLABS, last_slab = S::first_slab(blockIdx.x + 1);
#pragma unroll 1
  while (slab < end) {
    int last = min(S::SLABS, in_tile + end - slab);
    float sums[4][4] = {};
#pragma unroll 2
    for (; in_tile < last; ++in_tile) {
      uint4 w[S::LOADS], b[2];
      read_slab<WHICH>(ring.wait_slab(slab_bytes(S::bits)), w);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        b[half] = *(const uint4*)(x + in_tile * (WARPS * 64) + 32 * half);
      ring.release_slab(S::GANG, ++slab == last_slab);
      auto multiply = [&](const u32* near, const u32* far, int half) {
        mma(sums[2 * half], near[0], far[0], near[1], far[1], b[half].x, b[half].y);
        mma(sums[2 * half + 1], near[2], far[2], near[3], far[3], b[half].z, b[half].w);
      };
      if constexpr (S::bits == 4) {
        unpack<4>(w, multiply);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          unpack<S::bits>(w + half * (S::LOADS / 2),
                          [&](const u32* near, const u32* far, int) { multiply(near, far, half); });
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (2 * t + i % 2 < ROWS)
        part[(g + i / 2 * 8) * ROWS + 2 * t + i % 2] =
            (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    part += WARPS * CHANNELS * ROWS;
    in_tile = 0;
  }
  sync();
  int o = threadIdx.x;
  const float* parts = partial + o / (CHANNELS * ROWS) * (WARPS * CHANNELS * ROWS) + o % (CHANNELS * ROWS);
  float sum = 0;
  if (o < CHUNK * CHANNELS * ROWS)
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += parts[other * CHANNELS * ROWS];
  return sum;
}

// A linear whose tiles belong to one block each: store(row, channel, value) is called for each of
// the block's outputs. The scale and bias of the first chunk are read by `before`, early.
template <int WHICH>
struct Whole {
  using S = Shape<WHICH>;
  u16 scale, bias;

  __device__ void before(const Linear& linear, int tile) {
    int channel = min(tile * CHANNELS + (int)threadIdx.x / ROWS, S::N - 1);
    scale = S::bits < 16 ? linear.scales[channel] : 0x3c00;
    bias = linear.bias ? linear.bias[channel] : 0;
  }

  template <typename Store>
  __device__ void run(Ring& ring, const Linear& linear, const u16* input, float* partial, Store store) {
    int tile = S::first_slab(blockIdx.x) / S::SLABS, last = S::first_slab(blockIdx.x + 1) / S::SLABS;
#pragma unroll 1
    while (tile < last) {
      int end = min(tile + CHUNK, last);
      float sum = product<WHICH>(ring, input, partial, tile * S::SLABS, end * S::SLABS);
      int channel = tile * CHANNELS + threadIdx.x / ROWS;
      if (channel < min(end * CHANNELS, S::N))
        store(threadIdx.x % ROWS, channel, sum * half_to_float(scale) + half_to_float(bias));
      tile = end;
      if (tile == last) break;
      before(linear, tile);
      sync();  // the sums were read: partial may be written again
    }
  }
};

// A linear whose tiles may be shared among blocks: parts of sums go to slots, SLOTS x ROWS x WIDTH.
template <int WHICH>
struct Split {
  using S = Shape<WHICH>;
  u16 scale;

  __device__ void before(const Linear& linear) {
    int channel = S::first_slab(blockIdx.x) / S::SLABS * CHANNELS + threadIdx.x / ROWS;
    scale = S::bits < 16 ? linear.scales[min(channel, S::N - 1)] : 0x3c00;
  }

  __device__ void run(Ring& ring, const u16* input, float* partial, float* slots, int num_slots) {
    int slab = S::first_slab(blockIdx.x), end = S::first_slab(blockIdx.x + 1);
    if (slab == end) return;  // the same for a whole block
    float sum = product<WHICH>(ring, input, partial, slab, end);
    int row = threadIdx.x % ROWS, channel = slab / S::SLABS * CHANNELS + threadIdx.x / ROWS;
    int tile = channel / CHANNELS, last = tile * S::SLABS + S::SLABS - 1;
    if (channel >= ((end - 1) / S::SLABS + 1) * CHANNELS) return;
    int slot = blockIdx.x - S::block_of(tile * S::SLABS);
    slots[(slot * ROWS + row) * WIDTH + channel] = sum * half_to_float(scale);
    if (end > last)  // the last to share the tile
      for (++slot; slot < num_slots; ++slot) slots[(slot * ROWS + row) * WIDTH + channel] = 0;
  }
};

// ---- Attention

#define PASS (WARPS * ABREAST)            // and a block
#define EARLY (PASS >= 60 ? 1 : 2)                           // passes whose keys and values are read ahead

struct Attention {
  const int *lengths, *sources;  // of each row; ROWS x max_len
  u16 *keys, *values;            // of the layer: ROWS x HEADS x max_len x HEAD_SIZE
  int max_len;
  uint4 key[EARLY], value[EARLY];

  static __device__ int slot_of(int pass) {
    int lane = threadIdx.x % 32;
    return pass * PASS + threadIdx.x / 32 * ABREAST + min(lane / PIECES, ABREAST - 1);
  }

  __device__ void read(int row, int head, int slot, uint4& k, uint4& v) const {
    k = v = uint4{0, 0, 0, 0};
    if (slot >= lengths[row]) return;
    long long source = sources[row * max_len + slot];
    long long at = ((source * HEADS + head) * max_len + slot) * HEAD_SIZE + threadIdx.x % 32 % PIECES * 8;
    k = *(const uint4*)(keys + at);
    v = *(const uint4*)(values + at);
  }

  // What is known before the query is.
  __device__ void before(int item) {
    if (item >= ROWS * HEADS) return;
#pragma unroll
    for (int pass = 0; pass < EARLY; ++pass)
      read(item / HEADS, item % HEADS, slot_of(pass), key[pass], value[pass]);
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

  __device__ void attend(Mix& mix, const float* query, const float* own_key, const float* own_value,
                         int slot, int length, uint4 key, uint4 value) const {
    int piece = threadIdx.x % 32 % PIECES * 8;
    float k[8], v[8], score = 0;
    spread({key.x, key.y}, k), spread({key.z, key.w}, k + 4);
    spread({value.x, value.y}, v), spread({value.z, value.w}, v + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (slot == length) k[j] = own_key[piece + j], v[j] = own_value[piece + j];
      score += k[j] * query[piece + j];
    }
    score = piece_sum(score);
    mix.add(slot <= length ? score : -1e30f, v);
  }

  __device__ void run(const u16* qkv, u16* attended, float* scratch) {
    float *query = scratch, *own_key = query + HEAD_SIZE, *own_value = own_key + HEAD_SIZE;
    float *highest = own_value + HEAD_SIZE, *weight = highest + WARPS, *mixed = weight + WARPS;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int item = blockIdx.x; item < ROWS * HEADS; item += BLOCKS) {
      if (item != blockIdx.x) before(item);
      int row = item / HEADS, head = item % HEADS, length = lengths[row];
      for (int i = threadIdx.x; i < 3 * HEAD_SIZE; i += THREADS) {
        int which = i / HEAD_SIZE, d = i % HEAD_SIZE;
        u16 half = load_half(qkv + ((row * 3 + which) * HEADS + head) * HEAD_SIZE + d);
        query[i] = which ? half_to_float(half) : half_to_float(half) * rsqrtf(HEAD_SIZE);
        long long slot = ((long long)(row * HEADS + head) * max_len + length) * HEAD_SIZE + d;
        if (which == 1) keys[slot] = half;
        if (which == 2) values[slot] = half;
      }
      sync();

      Mix mix;
#pragma unroll
      for (int pass = 0; pass < EARLY; ++pass)
        attend(mix, query, own_key, own_value, slot_of(pass), length, key[pass], value[pass]);
#pragma unroll 1
      for (int pass = EARLY; pass * PASS <= length; ++pass) {
        uint4 k, v;
        read(row, head, slot_of(pass), k, v);
        attend(mix, query, own_key, own_value, slot_of(pass), length, k, v);
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
        attended[(row * HEADS + head) * HEAD_SIZE + threadIdx.x] = float_to_half(sum / norm);
      }
      sync();  // scratch is read: the next item may write it
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    step(const Model* addresses, const long long* tokens, long long* row_lengths, const int* sources,
         u16* keys, u16* values, u16* qkv, u16* attended, u16* hidden, float* slots, float* logits,
         u32* barriers, int max_len) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Model model;
  __shared__ int lengths[ROWS];
  __shared__ float scratch[2 * ROWS * WARPS];
  __shared__ __align__(8) long long ring_barriers[2 * DEPTH];
  u16* input = (u16*)(shared + DEPTH * STAGE_BYTES);  // and attention's scratch
  float* partial = (float*)(shared + SHARED) - CHUNK * WARPS * CHANNELS * ROWS;

  Ring ring(shared, ring_barriers);
  if (threadIdx.x == 0) ring.prepare();
  for (int i = threadIdx.x; i < sizeof(Model) / 8; i += blockDim.x)
    ((long long*)&model)[i] = ((const long long*)addresses)[i];
  if (threadIdx.x < ROWS) lengths[threadIdx.x] = row_lengths[threadIdx.x];
  __syncthreads();
  if (threadIdx.x >= THREADS) return copy_weights(ring, model);

  Barrier barrier{barriers, 0};
  Attention attention{lengths, sources, keys, values, max_len};

  Stream stream;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (own(i) >= WIDTH) continue;
      float word[4], place[4];
      spread(*(const uint2*)(model.embedding + tokens[r] * WIDTH + own(i)), word);
      spread(*(const uint2*)(model.positions + (long long)lengths[r] * WIDTH + own(i)), place);
#pragma unroll
      for (int j = 0; j < 4; ++j) stream.x[r][i][j] = word[j] + place[j];
    }

  const u16* last_bias = nullptr;
  int last_slots = 0;
#pragma unroll 1
  for (int index = 0; index < LAYERS; ++index) {
    const Layer& layer = model.layers[index];
    Fours f = fours(layer.input_norm, last_bias);
    Whole<QKV> qkv_linear;
    qkv_linear.before(layer.qkv, Shape<QKV>::first_slab(blockIdx.x) / Shape<QKV>::SLABS);
    if (index) barrier.wait();
    stage_norm(stream, slots, last_slots, f, input, scratch);
    qkv_linear.run(ring, layer.qkv, input, partial, [&](int row, int channel, float y) {
      qkv[row * 3 * WIDTH + channel] = float_to_half(y);
    });
    barrier.arrive();
    attention.before(blockIdx.x);
    barrier.wait();
    attention.run(qkv, attended, (float*)input);
    attention.keys += (long long)ROWS * HEADS * max_len * HEAD_SIZE;
    attention.values += (long long)ROWS * HEADS * max_len * HEAD_SIZE;
    barrier.arrive();
    Split<DENSE> dense;
    dense.before(layer.dense);
    barrier.wait();
    stage<WIDTH>(attended, input);
    dense.run(ring, input, partial, slots, DENSE_SLOTS);
    barrier.arrive();
    f = fours(layer.post_norm, layer.dense.bias);
    Whole<FC> fc;
    fc.before(layer.fc, Shape<FC>::first_slab(blockIdx.x) / Shape<FC>::SLABS);
    barrier.wait();
    stage_norm(stream, slots, DENSE_SLOTS, f, input, scratch);
    fc.run(ring, layer.fc, input, partial, [&](int row, int channel, float y) {
      hidden[row * FFN + channel] = float_to_half(fmaxf(y, 0.0f));
    });
    barrier.arrive();
    Split<PROJ> proj;
    proj.before(layer.proj);
    barrier.wait();
    stage<FFN>(hidden, input);
    proj.run(ring, input, partial, slots, PROJ_SLOTS);
    barrier.arrive();
    last_bias = layer.proj.bias;
    last_slots = PROJ_SLOTS;
  }

  Fours f = fours(model.final_norm, last_bias);
  Whole<HEAD> head;
  head.before(model.head, Shape<HEAD>::first_slab(blockIdx.x) / Shape<HEAD>::SLABS);
  barrier.wait();
  // Every block has read the lengths, and none will wait again once it is here.
  if (blockIdx.x == 0 && threadIdx.x < ROWS) row_lengths[threadIdx.x] = lengths[threadIdx.x] + 1;
  if (threadIdx.x == 0) {
    u32 before;
    asm volatile("atom.inc.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(barriers + 1), "n"(BLOCKS - 1)
                 : "memory");
    if (before == BLOCKS - 1) barriers[0] = 0;
  }
  stage_norm(stream, slots, last_slots, f, input, scratch);
  head.run(ring, model.head, input, partial, [&](int row, int channel, float y) {
    logits[(long long)row * VOCAB + channel] = y;
  });
}

// One decoding step of OPT for up to 8 rows, as one kernel: from tokens to logits.
//
// A step reads every weight once and does little else, so what counts is that the memory never
// waits. One block on every multiprocessor runs all layers, with a barrier between the blocks where
// one linear needs what another made. Weights depend on nothing: each thread keeps DEPTH requests
// of 16 bytes for its weights of this linear, the next one and the next layer's under way (cp.async
// into shared memory, a queue of its own), across all barriers.
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

#include "fragments.cuh"

#define THREADS (32 * WARPS)
#define HEAD_SIZE (WIDTH / HEADS)
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
struct Shape : Format<WHICH == HEAD ? HEAD_BITS : BITS> {
  static constexpr int bits = WHICH == HEAD ? HEAD_BITS : BITS;
  static constexpr int K = WHICH == PROJ ? FFN : WIDTH;
  static constexpr int N = WHICH == QKV ? 3 * WIDTH : WHICH == FC ? FFN : WHICH == HEAD ? VOCAB : WIDTH;
  static constexpr int TILES = (N + CHANNELS - 1) / CHANNELS;
  // A slab is a group of inputs for each warp: what a block multiplies at a time.
  static constexpr int SLABS = K / Format<bits>::GROUP / WARPS;  // of a tile
  static constexpr bool SPLIT = WHICH == DENSE || WHICH == PROJ;
  static constexpr int DEALT = SPLIT ? TILES * SLABS : TILES;
  static constexpr int SHARERS = DEALT < BLOCKS ? DEALT : BLOCKS;
  // Between the near and the far weights of a thread; from one slab to the next; extra at a tile's end.
  static constexpr int FAR = bits == 16 ? 8 * K * 2 : 0;
  static constexpr int STEP = WARPS * (bits == 16 ? 64 : 512);
  static constexpr int JUMP = bits == 16 ? CHANNELS * K * 2 - SLABS * STEP : 0;

  static __device__ int first_slab(int block) {
    int dealt = min(block, SHARERS) * DEALT / SHARERS;
    return SPLIT ? dealt : dealt * SLABS;
  }

  static __device__ int block_of(int slab) { return ((slab + 1) * SHARERS - 1) / DEALT; }  // SPLIT

  static __device__ const char* address(const char* weight, int slab) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long tile = slab / SLABS, group = slab % SLABS * WARPS + warp;
    if (bits == 16) return weight + ((tile * CHANNELS + lane / 4) * K + group * 32 + lane % 4 * 8) * 2;
    return weight + ((tile * (SLABS * WARPS)) + group) * 512 + lane * 16;
  }
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

// ---- Weights, requested far ahead

struct Queue {
  u32 begin, end, slot;  // of this thread's queue, shared memory addresses
  const char* at;        // what is requested next
  int far, step, jump, slabs;
  int in_tile, left;     // slabs behind in the tile, and still to come in the linear
  int linear, loads, load;
  const Model* model;

  __device__ Queue(const Model* model, const void* ring) : linear(-1), load(0), model(model) {
    begin = slot = (u32)__cvta_generic_to_shared(ring) + threadIdx.x * 16;
    end = begin + DEPTH * THREADS * 16;
    next_linear();
#pragma unroll 1
    for (int i = 0; i < DEPTH; ++i) refill();
  }

  template <int WHICH>
  __device__ void start(const char* weight) {
    using S = Shape<WHICH>;
    int first = S::first_slab(blockIdx.x);
    left = S::first_slab(blockIdx.x + 1) - first;
    in_tile = first % S::SLABS;
    slabs = S::SLABS, far = S::FAR, step = S::STEP, jump = S::JUMP, loads = S::LOADS;
    at = S::address(weight, first);
  }

  __device__ void next_linear() {
    do {
      ++linear;
      const Layer& layer = model->layers[linear / 4];
      if (linear == 4 * LAYERS) start<HEAD>(model->head.weight);
      else if (linear > 4 * LAYERS) left = 1 << 30;
      else if (linear % 4 == QKV) start<QKV>(layer.qkv.weight);
      else if (linear % 4 == DENSE) start<DENSE>(layer.dense.weight);
      else if (linear % 4 == FC) start<FC>(layer.fc.weight);
      else start<PROJ>(layer.proj.weight);
    } while (left == 0);
  }

  // Requests the next 16 bytes into the slot that was just read.
  __device__ void refill() {
    if (linear <= 4 * LAYERS) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot), "l"(at + (load ? far : 0))
                   : "memory");
      if (++load == loads) {
        load = 0;
        at += step;
        if (++in_tile == slabs) in_tile = 0, at += jump;
        if (--left == 0) next_linear();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    slot = slot + THREADS * 16 == end ? begin : slot + THREADS * 16;
  }

  template <int LOADS>
  __device__ void read(uint4* w) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - LOADS) : "memory");
    u32 from = slot;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[i].x), "=r"(w[i].y), "=r"(w[i].z), "=r"(w[i].w)
                   : "r"(from));
      from = from + THREADS * 16 == end ? begin : from + THREADS * 16;
    }
  }
};

// ---- What the blocks tell one another

struct Barrier {
  u32* arrived;
  u32 target;

  __device__ void arrive() {
    __syncthreads();
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
    __syncthreads();
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

__device__ inline void spread(uint2 halves, float* out) {
  out[0] = half_to_float(halves.x & 0xffff), out[1] = half_to_float(halves.x >> 16);
  out[2] = half_to_float(halves.y & 0xffff), out[3] = half_to_float(halves.y >> 16);
}

__device__ inline uint2 gather(const float* in) {
  return {float_to_half(in[0]) | (u32)float_to_half(in[1]) << 16,
          float_to_half(in[2]) | (u32)float_to_half(in[3]) << 16};
}

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
  __syncthreads();
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
  __syncthreads();
}

// Lays out what other blocks wrote.
template <int INPUTS>
__device__ inline void stage(const u16* from, u16* input) {
#pragma unroll
  for (int k = threadIdx.x * 8; k < ROWS * INPUTS; k += THREADS * 8)
    *(uint4*)(input + k / INPUTS * PITCH(INPUTS) + k % INPUTS) = load16(from + k);
  __syncthreads();
}

// ---- Linears

// Sums a block's slabs [slab, end) of at most CHUNK tiles; thread o gets output o of them, which is
// channel o / ROWS % 16 of tile o / ROWS / 16 for row o % ROWS.
template <int WHICH>
__device__ inline float product(Queue& queue, const u16* input, float* partial, int slab, int end) {
  using S = Shape<WHICH>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u16* x = input + min(g, ROWS - 1) * PITCH(S::K) + warp * S::GROUP + t * 8;
  int in_tile = slab % S::SLABS;
  float* part = partial + warp * CHANNELS * ROWS;
  float sums[2][4] = {};
#pragma unroll 1
  for (; slab < end; ++slab) {
    uint4 w[S::LOADS], b[S::HALVES];
    queue.read<S::LOADS>(w);
#pragma unroll
    for (int half = 0; half < S::HALVES; ++half)
      b[half] = *(const uint4*)(x + in_tile * (WARPS * S::GROUP) + 32 * half);
    unpack<S::bits>(w, [&](const u32* near, const u32* far, int half) {
      mma(sums[0], near[0], far[0], near[1], far[1], b[half].x, b[half].y);
      mma(sums[1], near[2], far[2], near[3], far[3], b[half].z, b[half].w);
    });
#pragma unroll
    for (int load = 0; load < S::LOADS; ++load) queue.refill();
    if (++in_tile == S::SLABS || slab + 1 == end) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (2 * t + i % 2 < ROWS) part[(g + i / 2 * 8) * ROWS + 2 * t + i % 2] = sums[0][i] + sums[1][i];
        sums[0][i] = sums[1][i] = 0;
      }
      in_tile = 0;
      part += WARPS * CHANNELS * ROWS;
    }
  }
  __syncthreads();
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
  __device__ void run(Queue& queue, const Linear& linear, const u16* input, float* partial, Store store) {
    int tile = S::first_slab(blockIdx.x) / S::SLABS, last = S::first_slab(blockIdx.x + 1) / S::SLABS;
#pragma unroll 1
    while (tile < last) {
      int end = min(tile + CHUNK, last);
      float sum = product<WHICH>(queue, input, partial, tile * S::SLABS, end * S::SLABS);
      int channel = tile * CHANNELS + threadIdx.x / ROWS;
      if (channel < min(end * CHANNELS, S::N))
        store(threadIdx.x % ROWS, channel, sum * half_to_float(scale) + half_to_float(bias));
      tile = end;
      if (tile == last) break;
      before(linear, tile);
      __syncthreads();  // the sums were read: partial may be written again
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

  __device__ void run(Queue& queue, const u16* input, float* partial, float* slots, int num_slots) {
    int slab = S::first_slab(blockIdx.x), end = S::first_slab(blockIdx.x + 1);
    if (slab == end) return;  // the same for a whole block
    float sum = product<WHICH>(queue, input, partial, slab, end);
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

#define PIECES (HEAD_SIZE / 8)            // 16 bytes of a key or value: one lane's
#define ABREAST (32 / PIECES)             // slots that a warp attends to at a time
#define PASS (WARPS * ABREAST)            // and a block
#define EARLY 2                           // passes whose keys and values are read ahead

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

  static __device__ float group_sum(float x) {
    int lane = threadIdx.x % 32, piece = lane % PIECES;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
      if (offset >= PIECES) continue;
      float other = __shfl_down_sync(~0u, x, offset);
      if (piece < offset && piece + offset < PIECES) x += other;
    }
    return __shfl_sync(~0u, x, lane - piece);
  }

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
    score = group_sum(score);
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
      __syncthreads();

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
      __syncthreads();
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
      __syncthreads();  // scratch is read: the next item may write it
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    step(const Model* addresses, const long long* tokens, long long* row_lengths, const int* sources,
         u16* keys, u16* values, u16* qkv, u16* attended, u16* hidden, float* slots, float* logits,
         u32* barriers, int max_len) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Model model;
  __shared__ int lengths[ROWS];
  __shared__ float scratch[2 * ROWS * WARPS];
  char* ring = shared;
  u16* input = (u16*)(shared + DEPTH * THREADS * 16);  // and attention's scratch
  float* partial = (float*)(shared + SHARED) - CHUNK * WARPS * CHANNELS * ROWS;

  for (int i = threadIdx.x; i < sizeof(Model) / 8; i += THREADS)
    ((long long*)&model)[i] = ((const long long*)addresses)[i];
  if (threadIdx.x < ROWS) lengths[threadIdx.x] = row_lengths[threadIdx.x];
  __syncthreads();
  Queue queue(&model, ring);
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
    qkv_linear.run(queue, layer.qkv, input, partial, [&](int row, int channel, float y) {
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
    dense.run(queue, input, partial, slots, DENSE_SLOTS);
    barrier.arrive();
    f = fours(layer.post_norm, layer.dense.bias);
    Whole<FC> fc;
    fc.before(layer.fc, Shape<FC>::first_slab(blockIdx.x) / Shape<FC>::SLABS);
    barrier.wait();
    stage_norm(stream, slots, DENSE_SLOTS, f, input, scratch);
    fc.run(queue, layer.fc, input, partial, [&](int row, int channel, float y) {
      hidden[row * FFN + channel] = float_to_half(fmaxf(y, 0.0f));
    });
    barrier.arrive();
    Split<PROJ> proj;
    proj.before(layer.proj);
    barrier.wait();
    stage<FFN>(hidden, input);
    proj.run(queue, input, partial, slots, PROJ_SLOTS);
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
  head.run(queue, model.head, input, partial, [&](int row, int channel, float y) {
    logits[(long long)row * VOCAB + channel] = y;
  });
}

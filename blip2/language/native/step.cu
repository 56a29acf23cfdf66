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

#include "step_attention.cuh"
#include "step_linears.cuh"
#include "step_stream.cuh"

__host__ __device__ constexpr int larger(int a, int b) { return a < b ? b : a; }
constexpr int INPUT_BYTES = larger(2 * larger(WIDTH, FFN), Attention::SCRATCH_BYTES);
constexpr int PARTIAL_BYTES = 4 * CHUNK * WARPS * CHANNELS;
static_assert(DEPTH * STAGE_BYTES + INPUT_BYTES + PARTIAL_BYTES <= SHARED, "shared memory is too small");

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    step(const Model* addresses, const long long* token, long long* row_length, u16* keys, u16* values,
         float* qkv, float* attended, u16* hidden, float* slots, float* logits, u32* first_mark,
         int max_len) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Model model;
  __shared__ float2 scratch[WARPS];
  __shared__ __align__(8) long long ring_barriers[2 * DEPTH];
  u16* input = (u16*)(shared + DEPTH * STAGE_BYTES);  // and attention's scratch
  float* partial = (float*)(shared + SHARED - PARTIAL_BYTES);

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
    to_floats(*(const uint2*)(model.embedding + *token * WIDTH + own(i)), word);
    to_floats(*(const uint2*)(model.positions + (long long)length * WIDTH + own(i)), place);
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
    qkv_linear.prefetch(layer.qkv);
    if (index) stream.add(slots, proj_mark, f);
    stream.normalise(f, input, scratch);
    qkv_linear.run(ring, layer.qkv, input, partial, [&](int channel, float y) {
      write_marked(qkv + channel, y, mark);
    });
    attention.prefetch(blockIdx.x);
    attention.run(qkv, attended, (float*)input, mark);
    attention.keys += (long long)HEADS * max_len * HEAD_SIZE;
    attention.values += (long long)HEADS * max_len * HEAD_SIZE;
    Split<DENSE> dense;
    dense.prefetch(layer.dense);
    f = fours(layer.post_norm, layer.dense.bias);
    load_inputs<WIDTH>(attended, input, mark);
    dense.run(ring, input, partial, slots, dense_mark);
    Whole<FC> fc;
    fc.prefetch(layer.fc);
    stream.add(slots, dense_mark, f);
    stream.normalise(f, input, scratch);
    fc.run(ring, layer.fc, input, partial, [&](int channel, float y) {
      write_marked_relu(hidden + channel, y, mark);
    });
    Split<PROJ> proj;
    proj.prefetch(layer.proj);
    f = fours(index + 1 < LAYERS ? model.layers[index + 1].input_norm : model.final_norm, layer.proj.bias);
    load_inputs<FFN>(hidden, input, mark);
    proj.run(ring, input, partial, slots, proj_mark);
  }

  Whole<HEAD> head;
  head.prefetch(model.head);
  stream.add(slots, proj_mark, f);
  // All blocks have read the length and the first mark: they had a share of this sum.
  if (blockIdx.x == 0 && threadIdx.x == 0) *row_length = length + 1, *first_mark = mark;
  stream.normalise(f, input, scratch);
  head.run(ring, model.head, input, partial, [&](int channel, float y) { logits[channel] = y; });
}

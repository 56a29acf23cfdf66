// One decoding step of OPT for one row, as one kernel: from the token to logits.
//
// A step reads every weight once and does little else, so what counts is that the memory never waits.
// One block on every multiprocessor runs all layers. Weights depend on nothing: in each block a warp of
// its own copies them to shared memory, so that those of this linear, the next one and the next layer's
// are under way whatever the blocks wait for. Plain asynchronous copies by all threads would do too, but
// block the loads of everything else.
//
// The blocks never meet at a barrier: that takes a round trip for the writes to arrive, one for the
// count and one for the reads. Instead each word that one block writes for others carries a mark, and
// readers ask until all words they read have it. docs/step.md argues why that is safe.
//
//   step_model.cuh      the model, as a table of addresses
//   step_shares.cuh     which block has which part of a linear, and what is checked about that
//   step_weights.cuh    weights, copied to shared memory ahead of their use
//   step_marks.cuh      words that one block writes and others wait for
//   step_inputs.cuh     such words, laid out in shared memory as a linear's inputs
//   step_linears.cuh    products and sums
//   step_attention.cuh  attention over the cache
//   step_stream.cuh     the residual stream and its LayerNorm
//
// No result depends on timing: parts of a sum are added up in the same order by whoever reads them.
//
// Compiled by NVRTC with BITS, FLOAT8, HEAD_BITS, WARPS, BLOCKS, SLOTS, STAGE, DEPTH, UNDER_WAY, SHARED, WIDTH,
// FFN, HEADS, LAYERS and VOCAB defined; fused_step.py says how they are chosen.

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

  // Dense and proj take turns in the slots: each always has the same mark.
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
  // All blocks have read the length and the first mark: each had a share of fc, of which this sum is made.
  if (blockIdx.x == 0 && threadIdx.x == 0) *row_length = length + 1, *first_mark = mark;
  stream.normalise(f, input, scratch);
  head.run(ring, model.head, input, partial, [&](int channel, float y) { logits[channel] = y; });
}

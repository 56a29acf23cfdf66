"""The small kernels of a decoding step, in Triton; linear.cu holds the large one.

Each is launched dependent on the one before it (PDL, Hopper and later): it starts while its
predecessor drains and waits, before it reads what that one wrote, in `gdc_wait`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def embed_kernel(
    tokens,  # rows, int64
    lengths,  # rows, int64: tokens so far, which is also the position of this one
    embedding,  # vocab_size x width
    positions,  # max_len x width
    x,  # rows x width, float32
    width,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x[row] = embedding[tokens[row]] + positions[lengths[row]]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    token = tl.load(tokens + row)
    position = tl.load(lengths + row)
    word = tl.load(embedding + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    place = tl.load(positions + position * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row * width + columns, word + place, mask=inside)


@triton.jit
def _row_statistics(x, width, eps, BLOCK: tl.constexpr):
    """Mean and 1 / standard deviation of one row of `width` float32 values."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + columns, mask=inside, other=0.0)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)


@triton.jit
def norm_kernel(
    x,  # rows x width, float32
    weight,
    bias,
    out,  # rows x width
    width,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """LayerNorm of each row, accumulated in float32."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    mean, scale = _row_statistics(x + row * width, width, eps, BLOCK)
    values = tl.load(x + row * width + columns, mask=inside, other=0.0)
    values = (values - mean) * scale * tl.load(weight + columns, mask=inside, other=0.0)
    values += tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, values, mask=inside)


@triton.jit
def _load_slots(
    keys,
    values,
    sources,
    start,
    length,
    row,
    head,
    heads,
    max_len,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """BLOCK_L cached keys and values of a row, float16, and which of them exist."""
    depth = tl.arange(0, BLOCK_D)
    slots = start + tl.arange(0, BLOCK_L)
    there = slots < length
    source = tl.load(sources + row * max_len + slots, mask=there, other=0)
    at = ((source * heads + head).to(tl.int64) * max_len + slots)[:, None] * D + depth[None, :]
    seen = there[:, None] & (depth < D)[None, :]
    k = tl.load(keys + at, mask=seen, other=0.0)
    v = tl.load(values + at, mask=seen, other=0.0)
    return k, v, there


@triton.jit
def _attend_slots(query, k, v, there, highest, norm, mixed):
    """One step of the online softmax: (highest score, sum of weights, weighted values)."""
    scores = tl.sum(k.to(tl.float32) * query[None, :], axis=1)
    scores = tl.where(there, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=0))
    weights = tl.exp(scores - higher)
    fade = tl.exp(highest - higher)
    norm = norm * fade + tl.sum(weights, axis=0)
    mixed = mixed * fade + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
    return higher, norm, mixed


@triton.jit
def attention_kernel(
    qkv,  # rows x 3 x heads x D, float16
    keys,  # cache rows x heads x max_len x D, this layer's
    values,
    lengths,  # rows, int64: tokens in the cache, without this one
    sources,  # rows x max_len, int32: in which cache row each slot of a row lies
    out,  # rows x heads x D, float16
    max_len,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of each row's new token over its cache, to which its key and value are added."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    depth = tl.arange(0, BLOCK_D)
    deep = depth < D
    # The cache is from earlier steps: its first slots are read before the query is there.
    length = tl.load(lengths + row).to(tl.int32)
    k, v, there = _load_slots(
        keys, values, sources, 0, length, row, head, heads, max_len, D, BLOCK_D, BLOCK_L
    )
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    own = qkv + (row * 3 * heads + head) * D + depth
    query = tl.load(own, mask=deep, other=0.0).to(tl.float32) * softmax_scale
    key = tl.load(own + heads * D, mask=deep, other=0.0)
    value = tl.load(own + 2 * heads * D, mask=deep, other=0.0)
    slot = ((row * heads + head).to(tl.int64) * max_len + length) * D + depth
    tl.store(keys + slot, key, mask=deep)
    tl.store(values + slot, value, mask=deep)

    # The new token is seen from registers; the others come from the cache.
    highest = tl.sum(query * key.to(tl.float32), axis=0)
    norm = 1.0
    mixed = value.to(tl.float32)
    highest, norm, mixed = _attend_slots(query, k, v, there, highest, norm, mixed)
    for start in range(BLOCK_L, length, BLOCK_L):
        k, v, there = _load_slots(
            keys, values, sources, start, length, row, head, heads, max_len, D, BLOCK_D, BLOCK_L
        )
        highest, norm, mixed = _attend_slots(query, k, v, there, highest, norm, mixed)
    tl.store(out + (row * heads + head) * D + depth, mixed / norm, mask=deep)

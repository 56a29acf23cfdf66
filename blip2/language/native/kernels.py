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
def norm_kernel(
    x,  # rows x width, float32
    product,  # rows x width, and width: what is still to be added to x, where ADD
    product_bias,
    weight,
    bias,
    out,  # rows x width
    width,
    eps,
    ADD: tl.constexpr,
    ADD_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """LayerNorm of each row, accumulated in float32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * width + columns
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        values += tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
        if ADD_BIAS:
            values += tl.load(product_bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, values, mask=inside)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(out + at, normed * scale + shift, mask=inside)


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


@triton.jit
def prompt_attention_kernel(
    qkv,  # requests x length x 3 x heads x D, float16
    keys,  # cache rows x heads x max_len x D, this layer's
    values,
    out,  # requests x length x heads x D, float16
    length,
    num_beams,  # cache rows a request: the first keeps the prompt
    max_len,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Causal attention of prompts, whose keys and values go to the cache."""
    block, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    depth = tl.arange(0, BLOCK_D)
    own = block * BLOCK + tl.arange(0, BLOCK)
    at = ((request * length + own) * 3 * heads + head).to(tl.int64)[:, None] * D + depth[None, :]
    there = (own < length)[:, None] & (depth < D)[None, :]
    query = tl.load(qkv + at, mask=there, other=0.0)
    row = (request * num_beams * heads + head).to(tl.int64) * max_len
    slots = (row + own)[:, None] * D + depth[None, :]
    tl.store(keys + slots, tl.load(qkv + at + heads * D, mask=there, other=0.0), mask=there)
    tl.store(values + slots, tl.load(qkv + at + 2 * heads * D, mask=there, other=0.0), mask=there)

    highest = tl.full((BLOCK,), -1e30, tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        other = start + tl.arange(0, BLOCK)
        at = ((request * length + other) * 3 * heads + head).to(tl.int64)[:, None] * D
        at += depth[None, :]
        there_too = (other < length)[:, None] & (depth < D)[None, :]
        key = tl.load(qkv + at + heads * D, mask=there_too, other=0.0)
        value = tl.load(qkv + at + 2 * heads * D, mask=there_too, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * softmax_scale
        scores = tl.where(other[None, :] <= own[:, None], scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        norm = norm * fade + tl.sum(weights, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(tl.float16), value)
        highest = higher
    at = ((request * length + own) * heads + head).to(tl.int64)[:, None] * D + depth[None, :]
    tl.store(out + at, mixed / norm[:, None], mask=there)

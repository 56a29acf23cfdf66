"""The small kernels of prompts and of steps, in Triton; those in CUDA C++ are the .cu files.

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
    parts,  # PARTS x rows x width, and width: what is still to be added to x
    parts_bias,
    weight,
    bias,
    out,  # rows x width
    width,
    eps,
    PARTS: tl.constexpr,
    ADD_BIAS: tl.constexpr,
    ORDERED: tl.constexpr,  # write `out` in the order of packed weights (linear_many.cu)
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
    first = tl.program_id(0).to(tl.int64) * width
    at = first + columns
    values = tl.load(x + at, mask=inside, other=0.0)
    if PARTS:
        for part in tl.static_range(PARTS):
            there = parts + part * tl.num_programs(0).to(tl.int64) * width + at
            values += tl.load(there, mask=inside, other=0.0).to(tl.float32)
        if ADD_BIAS:
            values += tl.load(parts_bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, values, mask=inside)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    if ORDERED:
        columns = (columns & ~31) | ((columns & 6) << 2) | ((columns >> 2) & 6) | (columns & 1)
    tl.store(out + first + columns, normed * scale + shift, mask=inside)


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


@triton.jit
def move_rows_kernel(
    keys,  # layers x rows x heads x max_len x D
    values,
    lengths,  # rows, int64: tokens of each
    pairs,  # 2 x moves, int64: rows, and the ones that become copies of them
    layer_size,  # rows · heads · max_len · D
    head_size,  # max_len · D
    D,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy one head of one layer of a row, as far as it has tokens."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, layer, move = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = tl.load(pairs + move)
    target = tl.load(pairs + tl.num_programs(2) + move)
    size = (tl.load(lengths + source) * D).to(tl.int32)
    start = layer.to(tl.int64) * layer_size
    start_from = start + (source * tl.num_programs(0) + head) * head_size
    start_to = start + (target * tl.num_programs(0) + head) * head_size
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        there = at < size
        key = tl.load(keys + start_from + at, mask=there)
        value = tl.load(values + start_from + at, mask=there)
        tl.store(keys + start_to + at, key, mask=there)
        tl.store(values + start_to + at, value, mask=there)


@triton.jit
def _likeliest(logits, row, vocab_size, BLOCK: tl.constexpr):
    """The likeliest token of a row, of several the first, the sum of its logits, and the token's
    log probability."""
    columns = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = columns
    total = tl.zeros((BLOCK,), tl.float32)
    exp_sum = tl.zeros((BLOCK,), tl.float32)  # of exp(logit - highest), a lane
    for start in range(0, vocab_size, BLOCK):
        column = start + columns
        at = row.to(tl.int64) * vocab_size + column
        values = tl.load(logits + at, mask=column < vocab_size, other=float("-inf"))
        total += tl.where(column < vocab_size, values, 0.0)
        where = tl.where(values > highest, column, where)
        higher = tl.maximum(highest, values)
        # Where a lane has seen nothing but -inf, -inf + inf would be NaN.
        base = tl.where(higher > float("-inf"), higher, 0.0)
        exp_sum = exp_sum * tl.exp(highest - base) + tl.exp(values - base)
        highest = higher
    best = tl.max(highest, axis=0)
    # NaN is no maximum: whatever is chosen then has to be a token.
    token = tl.min(tl.where(highest == best, where, vocab_size - 1), axis=0)
    # The token's own share of this sum is 1.
    log_prob = -tl.log(tl.sum(exp_sum * tl.exp(highest - best), axis=0))
    return token, tl.sum(total, axis=0), log_prob


@triton.jit
def likeliest_kernel(
    scores,  # rows x vocab_size, float32
    out,  # 2 x rows, int64: each row's likeliest token, and whether all its scores are finite
    vocab_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """What is to be known of scores where nothing else chooses."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, total, _ = _likeliest(scores, row, vocab_size, BLOCK)
    tl.store(out + row, token.to(tl.int64))
    tl.store(out + rows + row, (tl.abs(total) < float("inf")).to(tl.int64))  # of NaN too it is not


@triton.jit
def log_probs_kernel(
    logits,  # rows x vocab_size, float32
    tokens,  # rows, int64
    out,  # rows, float32
    vocab_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The log probability of each row's token."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    likeliest, _, log_prob = _likeliest(logits, row, vocab_size, BLOCK)
    first = logits + row.to(tl.int64) * vocab_size
    below = tl.load(first + tl.load(tokens + row)) - tl.load(first + likeliest)
    tl.store(out + row, log_prob + below)


@triton.jit
def greedy_kernel(
    logits,  # rows x vocab_size, float32
    chosen,  # rows, int64: each row's next token
    tokens,  # rows x max_tokens, int64: those chosen so far
    steps,  # rows, int64: how many they are
    ended,  # rows, bool
    sums,  # rows, float32: of all logits so far, where NaN and Inf stay
    log_probs,  # rows, float32: the sum of the answer's tokens' so far
    vocab_size,
    max_tokens,
    end_id,
    pad_id,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Append to each row the likeliest token, of several the first; a row that has ended is padded."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, total, log_prob = _likeliest(logits, row, vocab_size, BLOCK)
    had_ended = tl.load(ended + row)
    token = tl.where(had_ended, pad_id, token).to(tl.int64)
    step = tl.load(steps + row)
    tl.store(chosen + row, token)
    tl.store(tokens + row * max_tokens + step, token)
    tl.store(steps + row, step + 1)
    tl.store(ended + row, had_ended | (token == end_id))
    tl.store(log_probs + row, tl.load(log_probs + row) + tl.where(had_ended, 0.0, log_prob))
    tl.store(sums + row, tl.load(sums + row) + total)

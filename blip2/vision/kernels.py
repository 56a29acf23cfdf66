"""The ViT's and the Q-Former's kernels, in Triton; cuBLAS does the large products.

Each is launched dependent on the one before it (PDL, Hopper and later): it starts while its
predecessor drains and waits, before it reads what that one wrote, in `gdc_wait`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blip2.gpu.float8_kernels import layer_norm


@triton.jit
def _gelu(x):
    """x Φ(x) in float32: erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.

    The tail e^(-x²/2) stays a factor, so that negative results keep their relative precision.
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.23164189 * size)  # 0.3275911 / √2
    tail = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return tl.maximum(x, 0.0) - 0.5 * size * tail * tl.exp2(-0.72134752 * x * x)


@triton.jit
def norm_kernel(
    x,  # rows x width
    parts,  # PARTS x rows x width, float32, to add to x
    shift,  # width, float32, to add to x
    weight,
    bias,
    out,  # rows x width
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,  # whether x becomes x + parts
    PDL: tl.constexpr,
):
    """LayerNorm of each row of x + parts + shift, in float32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    moved = tl.load(shift + columns, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None].to(tl.int64) * width + columns[None, :]
    valid = (row < rows)[:, None] & inside[None, :]
    values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        values += tl.load(parts + part * rows * width + at, mask=valid, other=0.0)
    if KEEP:
        tl.store(x + at, values, mask=valid)
    values += moved[None, :]
    normed = layer_norm(values, inside, width, eps) * scale[None, :] + offset[None, :]
    tl.store(out + at, normed, mask=valid)


@triton.jit
def _attend_rows(
    qkv_low,
    qkv_high,
    qkv,
    out,
    image,
    head,
    heads,
    first,
    end,
    tokens,
    softmax_scale,
    D: tl.constexpr,
    D_LOW: tl.constexpr,
    D_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Attention of at most BLOCK_M of a picture's tokens, from `first` to `end`, to all of them."""
    low, high = tl.arange(0, D_LOW), D_LOW + tl.arange(0, D_HIGH)
    low_there, high_there = (low < D)[None, :], (high < D)[None, :]
    stride = 3 * heads * D
    query = qkv + image.to(tl.int64) * tokens * stride + head * D
    key = query + heads * D
    value = key + heads * D
    row = first + tl.arange(0, BLOCK_M)
    inside = (row < end)[:, None]
    at = row[:, None] * stride
    q_low = tl.load(query + at + low[None, :], mask=inside & low_there, other=0.0)
    q_high = tl.load(query + at + high[None, :], mask=inside & high_there, other=0.0)

    # The softmax starts with the class token's key and value, which leaves whole blocks of patches.
    class_low = tl.load(key + low, mask=low < D, other=0.0).to(tl.float32)
    class_high = tl.load(key + high, mask=high < D, other=0.0).to(tl.float32)
    highest = tl.sum(q_low.to(tl.float32) * class_low[None, :], axis=1)
    highest += tl.sum(q_high.to(tl.float32) * class_high[None, :], axis=1)
    norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    class_low = tl.load(value + low, mask=low < D, other=0.0).to(tl.float32)
    class_high = tl.load(value + high, mask=high < D, other=0.0).to(tl.float32)
    mixed_low = tl.zeros((BLOCK_M, D_LOW), tl.float32) + class_low[None, :]
    mixed_high = tl.zeros((BLOCK_M, D_HIGH), tl.float32) + class_high[None, :]
    for start in range(1, tokens, BLOCK_N):
        at_key = image * tokens + start
        k_low = qkv_low.load([at_key, heads + head, 0]).reshape(BLOCK_N, D_LOW)
        k_high = qkv_high.load([at_key, heads + head, D_LOW]).reshape(BLOCK_N, D_HIGH)
        scores = tl.dot(q_low, k_low.T)
        scores = tl.dot(q_high, k_high.T, scores)
        if not EVEN:
            slot = start + tl.arange(0, BLOCK_N)
            scores = tl.where((slot < tokens)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores * softmax_scale - (higher * softmax_scale)[:, None])
        fade = tl.exp2((highest - higher) * softmax_scale)
        norm = norm * fade + tl.sum(weights, axis=1)
        highest = higher
        v_low = qkv_low.load([at_key, 2 * heads + head, 0]).reshape(BLOCK_N, D_LOW)
        v_high = qkv_high.load([at_key, 2 * heads + head, D_LOW]).reshape(BLOCK_N, D_HIGH)
        if not EVEN:  # another picture's rows lie behind the last: zero times NaN would be NaN
            v_low = tl.where((slot < tokens)[:, None], v_low, 0.0)
            v_high = tl.where((slot < tokens)[:, None], v_high, 0.0)
        weights = weights.to(v_low.dtype)
        mixed_low = tl.dot(weights, v_low, mixed_low * fade[:, None])
        mixed_high = tl.dot(weights, v_high, mixed_high * fade[:, None])
    target = out + (image.to(tl.int64) * tokens + row[:, None]) * (heads * D) + head * D
    inverse = (1.0 / norm)[:, None]
    tl.store(target + low[None, :], mixed_low * inverse, mask=inside & low_there)
    tl.store(target + high[None, :], mixed_high * inverse, mask=inside & high_there)


@triton.jit
def attention_kernel(
    qkv_low,  # descriptor of qkv, images · tokens x 3 · heads x D: blocks of BLOCK_N x 1 x D_LOW
    qkv_high,  # … and of BLOCK_N x 1 x D_HIGH: zeros behind D
    qkv,
    out,  # images x tokens x heads x D
    tokens,
    softmax_scale,  # times log2(e)
    D: tl.constexpr,
    D_LOW: tl.constexpr,  # a head's columns as two powers of two
    D_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_N divides the patches
    PDL: tl.constexpr,
):
    """Attention of a picture's tokens to one another: blocks of patches, then the class token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    if tile == tl.num_programs(0) - 1:
        _attend_rows(
            qkv_low,
            qkv_high,
            qkv,
            out,
            image,
            head,
            heads,
            0,
            1,
            tokens,
            softmax_scale,
            D,
            D_LOW,
            D_HIGH,
            16,  # the fewest that the tensor cores take
            BLOCK_N,
            EVEN,
        )
    else:
        _attend_rows(
            qkv_low,
            qkv_high,
            qkv,
            out,
            image,
            head,
            heads,
            1 + tile * BLOCK_M,
            tokens,
            tokens,
            softmax_scale,
            D,
            D_LOW,
            D_HIGH,
            BLOCK_M,
            BLOCK_N,
            EVEN,
        )


@triton.jit
def patches_kernel(
    pixels,  # images x 3 x side x side
    start,  # tokens x width: what each token's embedding starts from
    patches,  # images x tokens x padded: a token's pixels, zeros behind them and for token 0
    hidden,  # images x tokens x width
    side,
    width,
    padded,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,  # at least padded
    BLOCK_WIDTH: tl.constexpr,  # at least width
    PDL: tl.constexpr,
):
    """Cut pictures into patches, and set the residual to what does not depend on them."""
    token, image = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK_WIDTH)
    first = tl.load(start + token * width + columns, mask=columns < width, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = image.to(tl.int64) * tl.num_programs(0) + token
    tl.store(hidden + row * width + columns, first, mask=columns < width)
    at = tl.arange(0, BLOCK)
    channel, y, x = at // (PATCH * PATCH), at // PATCH % PATCH, at % PATCH
    across = side // PATCH
    y += (token - 1) // across * PATCH
    x += (token - 1) % across * PATCH
    there = (at < 3 * PATCH * PATCH) & (token > 0)
    source = (image.to(tl.int64) * 3 + channel) * side * side + y * side + x
    values = tl.load(pixels + source, mask=there, other=0.0)
    tl.store(patches + row * padded + at, values, mask=at < padded)


@triton.jit
def _to_tf32(x):
    """Round float32 to the 10 bits of mantissa that a TF32 product keeps; it would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def few_rows_linear_kernel(
    x,  # rows x inputs, float32
    weight,  # channels x inputs
    out,  # parts x rows x channels, float32: their sum is x Wᵀ
    rows,
    channels,
    inputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of inputs' part of x Wᵀ, in TF32 with float32 sums."""
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = part * BLOCK_K + tl.arange(0, BLOCK_K)
    channel_there, row_there, k_there = channel < channels, row < rows, (k < inputs)[None, :]
    # The weights do not depend on the kernel before: they are on their way meanwhile.
    mask = channel_there[:, None] & k_there
    w = tl.load(weight + channel[:, None] * inputs + k[None, :], mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mask = row_there[:, None] & k_there
    values = tl.load(x + row[:, None] * inputs + k[None, :], mask=mask, other=0.0)
    product = tl.dot(_to_tf32(values), w.to(tl.float32).T, input_precision="tf32")
    target = out + (part * rows + row[:, None]) * channels + channel[None, :]
    tl.store(target, product, mask=row_there[:, None] & channel_there[None, :])


@triton.jit
def sum_kernel(
    parts,  # PARTS x rows x width, float32
    bias,  # width
    out,  # rows x width
    size,  # rows · width
    width,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """[GELU](sum of the parts + bias)"""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(bias + at % width, mask=inside, other=0.0)
    for part in tl.static_range(PARTS):
        values += tl.load(parts + part * size + at, mask=inside, other=0.0)
    if GELU:
        values = _gelu(values)
    tl.store(out + at, values, mask=inside)


@triton.jit
def _sum_of_parts(at, mask, step, PARTS: tl.constexpr):
    values = tl.load(at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        values += tl.load(at + part * step, mask=mask, other=0.0)
    return _to_tf32(values)


@triton.jit
def query_attention_kernel(
    query,  # QUERY_PARTS x images · queries rows of query_width, float32, to be added up
    query_bias,  # heads x D, float32
    keys,  # KEY_PARTS x images · tokens rows of key_width, float32, to be added up
    values,
    out,  # images x queries x heads x D, float32
    queries,
    tokens,
    query_width,
    key_width,
    softmax_scale,  # times log2(e)
    QUERY_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of a picture's queries to its tokens, in TF32 with float32 sums."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, image = tl.program_id(0), tl.program_id(1)
    heads, images = tl.num_programs(0), tl.num_programs(1)
    depth, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    deep = (depth < D)[None, :]
    column = head * D + depth[None, :]
    there = (row < queries)[:, None] & deep
    at = query + (image * queries + row[:, None]) * query_width + column
    q = _sum_of_parts(at, there, images * queries * query_width, QUERY_PARTS)
    q += tl.load(query_bias + column, mask=deep, other=0.0)
    q = _to_tf32(q * softmax_scale)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        seen = (slot < tokens)[:, None] & deep
        place = (image * tokens + slot[:, None]).to(tl.int64) * key_width + column
        part = images.to(tl.int64) * tokens * key_width
        k = _sum_of_parts(keys + place, seen, part, KEY_PARTS)
        v = _sum_of_parts(values + place, seen, part, KEY_PARTS)
        scores = tl.dot(q, k.T, input_precision="tf32")
        scores = tl.where((slot < tokens)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(highest - higher)
        norm = norm * fade + tl.sum(weights, axis=1)
        mixed = tl.dot(_to_tf32(weights), v, mixed * fade[:, None], input_precision="tf32")
        highest = higher
    target = out + (image * queries + row[:, None]) * (heads * D) + column
    tl.store(target, mixed / norm[:, None], mask=there)

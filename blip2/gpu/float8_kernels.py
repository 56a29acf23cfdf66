"""The kernels that make a product's inputs in FP8, in Triton: a LayerNorm, an activation, or neither.

Each is launched dependent on the one before it (PDL, Hopper and later): it starts while its
predecessor drains and waits, before it reads what that one wrote, in `gdc_wait`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _gelu_by_tanh(x):
    """x σ(√(8/π) (x + 0.044715 x³)) in float32, within 5e-4 of x Φ(x)."""
    return x / (1.0 + tl.exp2(-x * (2.3022082 + 0.10294324 * x * x)))


@triton.jit
def layer_norm(values, inside, width, eps):
    """Rows of float32, 0 where a column is not `inside`, with mean 0 and variance 1."""
    mean = tl.sum(values, axis=1) / width
    centred = tl.where(inside[None, :], values - mean[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]


@triton.jit
def _float8_scale(largest):
    """What a row's values are divided by and times: its largest becomes 448, the largest of E4M3."""
    largest = tl.maximum(largest, 1e-30)  # of zeros it is 0
    return largest / 448.0, 448.0 / largest


@triton.jit
def norm_to_float8_kernel(
    x,  # rows x width
    product,  # rows x width, to add to x if ADDS
    shift,  # width, float32, to add to x for the norm alone
    weight,
    bias,
    out,  # rows x width, E4M3
    scales,  # rows, float32
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += product; LayerNorm of each row of x + shift, in E4M3 with a scale a row."""
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
    if ADDS:
        values += tl.load(product + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(x + at, values, mask=valid)
    values = layer_norm(values + moved[None, :], inside, width, eps)
    normed = values * scale[None, :] + offset[None, :]
    divisor, factor = _float8_scale(tl.max(tl.abs(normed), axis=1))
    tl.store(scales + row, divisor, mask=row < rows)
    tl.store(out + at, (normed * factor[:, None]).to(tl.float8e4nv), mask=valid)


@triton.jit
def to_float8_kernel(
    x,  # rows x width
    out,  # rows x width, E4M3
    scales,  # rows, float32
    width,
    LOW: tl.constexpr,  # a row's columns as two powers of two: 6144 takes 4096 + 2048, not 8192
    HIGH: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "gelu", "relu" or ""
    PDL: tl.constexpr,
):
    """The activation of x in E4M3, each row times what makes its largest 448."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    low_there, high_there = low < width, high < width
    first = tl.load(x + row * width + low, mask=low_there, other=0.0).to(tl.float32)
    second = tl.load(x + row * width + high, mask=high_there, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        first, second = _gelu_by_tanh(first), _gelu_by_tanh(second)
    elif ACTIVATION == "relu":
        first, second = tl.maximum(first, 0.0), tl.maximum(second, 0.0)
    largest = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
    divisor, factor = _float8_scale(largest)
    tl.store(scales + row, divisor)
    tl.store(out + row * width + low, (first * factor).to(tl.float8e4nv), mask=low_there)
    tl.store(out + row * width + high, (second * factor).to(tl.float8e4nv), mask=high_there)

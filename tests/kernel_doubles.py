"""Doubles of the kernels in CUDA C++, as PyTorch computes it on a CPU.

Each checks that a launch covers its work, and computes from the same arguments what the kernel is to
compute.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from blip2.gpu.boxes import Boxes
from blip2.language import sampling

# An H100, as far as the product asks.
PROPERTIES = types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10
)


def linear(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: int,
    channels: int,
    row_scales: torch.Tensor | None = None,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    """linear.cu, linear_hopper.cu and linear_hopper_packed.cu."""
    split = macros.get("SPLIT")
    covered = (16 * grid[0], 8 * macros["TILES"] * grid[1])
    if split:
        covered = (16 * macros["WARPS"] * grid[1], 8 * macros["TILES"])
        _rule(grid[0] == cluster == split, "a cluster has another size than its kernel")
        _rule(shared_bytes <= (228 << 10) // 2, "no two blocks on a multiprocessor")
    _rule(threads == 32 * macros["WARPS"], "threads")
    _rule(covered[0] >= channels and covered[1] >= rows, "outputs are left out")
    _rule(tuple(x.shape) == (rows, macros["WIDTH"]) and x.is_contiguous(), "inputs")
    _rule(tuple(out.shape) == (rows, channels) and out.is_contiguous(), "outputs")
    _rule((bias is not None) == macros["HAS_BIAS"], "bias")
    _rule((out.dtype == torch.float32) == macros["OUT_FLOAT"], "the outputs' type")
    bits, float8 = macros["BITS"], macros["FLOAT8"]
    plain = bits == 16 or float8
    _rule((weight.dtype == torch.float8_e4m3fn) == float8, "the weights' type")
    _rule(
        (row_scales is not None) == (x.dtype == torch.float8_e4m3fn) == bool(float8 and split), "x"
    )
    values = weight if plain else unpacked(weight, bits, (channels, macros["WIDTH"]))
    y = x.float() @ values.float().T
    if bits < 16:
        _rule(scales.dtype == (torch.float32 if float8 else torch.float16), "the scales' type")
        y *= scales.float()
    if row_scales is not None:
        y *= row_scales[:, None]
    if bias is not None:
        y += bias.float()
    if macros["RELU"]:
        y = y.relu()
    out.copy_(out + y if macros["RESIDUAL"] else y)


def unpack_weight(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    channels: int,
    inputs: int,
) -> None:
    """unpack.cu."""
    _rule(16 * grid[0] * threads >= packed.numel(), "weights are left out")
    weight.copy_(unpacked(packed, macros["BITS"], (channels, inputs)) * scales[:, None])


def unpacked(packed: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """The signed integers in a packed weight, channels x inputs in float16."""
    channels, inputs = shape
    if bits == 8:
        unsigned = packed.permute(0, 4, 2, 1, 3, 5)
    else:
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(6).unflatten(6, (2, 4))
        unsigned = nibbles.permute(0, 5, 2, 1, 4, 3, 7, 6)
    return unsigned.reshape(-1, inputs)[:channels].half() - (1 << (bits - 1))


def attention(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    sources: torch.Tensor,
    attended: torch.Tensor,
    max_len: int,
    softmax_scale: float,
) -> None:
    """attention.cu."""
    heads, count = grid
    _rule(threads == 32 * macros["WARPS"], "threads")
    _rule(keys.shape[1:] == (heads, max_len, macros["HEAD_SIZE"]), "the cache's shape")
    _rule(len(keys) >= count, "the cache has fewer rows")
    lengths, sources = lengths[:count], sources[:count]
    rows, slots = torch.arange(count), torch.arange(max_len)
    query, key, value = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    keys[rows, :, lengths] = key
    values[rows, :, lengths] = value
    sources = sources.long()
    sources[rows, lengths] = rows  # the new token is the row's own
    visible = slots <= lengths[:, None]
    seen_keys, seen_values = (
        cache[sources, :, slots].float().where(visible[:, :, None, None], 0)
        for cache in (keys, values)
    )
    scores = torch.einsum("rhd,rlhd->rhl", query.float(), seen_keys) * softmax_scale
    weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
    attended.copy_(torch.einsum("rhl,rlhd->rhd", weights, seen_values).flatten(1))


def step(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    addresses: torch.Tensor,
    token: torch.Tensor,
    length: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    qkv: torch.Tensor,
    attended: torch.Tensor,
    hidden: torch.Tensor,
    slots: torch.Tensor,
    logits: torch.Tensor,
    first_mark: torch.Tensor,
    max_len: int,
    shared_bytes: int,
    together: bool,
    dependent: bool,
) -> None:
    """step.cu; the model is read where its table of addresses says."""
    _rule(grid == (macros["BLOCKS"], 1) and threads == 32 * (macros["WARPS"] + 1), "blocks")
    _rule(shared_bytes == macros["SHARED"] and together, "blocks that do not wait for one another")
    _rule(not dependent, "it does not wait for the kernel before")
    _rule(keys.shape[3] == max_len, "the cache's shape")
    width, ffn, vocab = macros["WIDTH"], macros["FFN"], macros["VOCAB"]
    buffers = (qkv, attended, hidden, slots)
    shapes = [(3 * width,), (width,), (ffn,), (macros["SLOTS"], width)]
    _rule([tuple(buffer.shape) for buffer in buffers] == shapes, "what blocks write for others")
    # Of the first layer no word may be there already: of all buffers but the slots, where dense writes
    # with 1 and proj with 0, layers take turns in the marks.
    awaited, last = int(first_mark), int(first_mark) ^ (macros["LAYERS"] - 1) % 2
    for buffer, mark in zip(buffers, (awaited, awaited, awaited, 1), strict=True):
        _rule((marks(buffer) != mark).all(), "a mark is there before its word")
    table = iter(addresses.tolist())

    def vector(count: int = width) -> torch.Tensor:
        return tensor_at(next(table), (count,), torch.float16).float()

    def linear(channels: int, inputs: int, bits: int, bias: bool = True):
        if bits == 16:
            weight = tensor_at(next(table), (channels, inputs), torch.float16).float()
            next(table)
        elif macros["FLOAT8"]:
            weight = tensor_at(next(table), (channels, inputs), torch.float8_e4m3fn).float()
            weight *= tensor_at(next(table), (channels,), torch.float32)[:, None]
        else:
            group = 32 if bits == 8 else 64
            shape = (-(-channels // 16), inputs // group, 8, 4)
            shape += (2, 8) if bits == 8 else (2, 2, 4)
            packed = tensor_at(next(table), shape, torch.uint8)
            weight = unpacked(packed, bits, (channels, inputs)).float() * vector(channels)[:, None]
        if not bias:
            _rule(next(table) == 0, "the head has a bias")
        offset = vector(channels) if bias else None
        return lambda x: functional.linear(x.half().float(), weight, offset)

    def norm():
        weight, bias = vector(), vector()
        return lambda x: functional.layer_norm(x, (width,), weight, bias, 1e-5)

    bits, n = macros["BITS"], int(length)
    shapes = ((3 * width, width), (width, width), (ffn, width), (width, ffn))
    layers = [
        ([linear(*shape, bits) for shape in shapes], [norm(), norm()])
        for _ in range(macros["LAYERS"])
    ]
    head, final_norm = linear(vocab, width, macros["HEAD_BITS"], bias=False), norm()
    embedding = tensor_at(next(table), (vocab, width), torch.float16)
    positions = tensor_at(next(table), (n + 1, width), torch.float16)
    _rule(next(table, None) is None, "the table of addresses has another length")

    x = embedding[token].float() + positions[n].float()
    for index, ((qkv, dense, fc, proj), (input_norm, post_norm)) in enumerate(layers):
        query, key, value = qkv(input_norm(x)).unflatten(1, (3, macros["HEADS"], -1)).unbind(1)
        keys[index, 0, :, n], values[index, 0, :, n] = key[0], value[0]
        seen_keys, seen_values = (cache[index, 0, :, : n + 1].float() for cache in (keys, values))
        scores = torch.einsum("hd,hld->hl", query[0].half().float(), seen_keys)
        weights = (scores * query.shape[2] ** -0.5).softmax(-1)
        x = x + dense(torch.einsum("hl,hld->hd", weights, seen_values).reshape(1, width))
        x = x + proj(fc(post_norm(x)).relu())
    for buffer, mark in zip(buffers, (last, last, last, 0), strict=True):
        write_marks(buffer, mark)
    logits.copy_(head(final_norm(x)))
    length += 1
    first_mark ^= macros["LAYERS"] % 2


def span(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    attended: Boxes,
    normed: Boxes,
    hidden: Boxes,
    *arguments: Any,
    shared_bytes: int,
    together: bool,
) -> None:
    """span.cu."""
    linears, (*norms, x, parts, normed_to, hidden_to, qkv, counters, rows, eps) = (
        arguments[:12],
        arguments[12:],
    )
    width, ffn, bits = macros["WIDTH"], macros["FFN"], macros["BITS"]
    _rule(grid == (macros["BLOCKS"], 1) and threads == 192 + 576 * (bits < 16), "blocks")
    _rule(shared_bytes == macros["SHARED"] and together, "blocks that do not wait for one another")
    _rule(rows <= 64 and x.shape == (rows, width) and x.dtype == torch.float32, "rows")
    _rule(parts.shape == (macros["SPLIT"], 64, width), "parts")
    _rule(counters.shape == (4,) and counters.dtype == torch.int64, "counters")
    for boxes, columns in ((attended, width), (normed, width), (hidden, ffn)):
        _rule(boxes.matrix.shape == (rows, columns) and boxes.rows == 64, "inputs")
        _rule(boxes.row_bytes == 128, "boxes that the tensor cores cannot read")
    _rule(normed.matrix is normed_to and hidden.matrix is hidden_to, "what is written is read")
    shapes = {"DENSE": (width, width), "FC": (ffn, width), "PROJ": (width, ffn)}
    shapes["QKV"] = (3 * width, width)

    def products(index: int, name: str, channels: int, inputs: int) -> Callable[..., torch.Tensor]:
        weight, scales, bias = linears[index], linears[4 + index], linears[8 + index]
        if bits == 16:
            _rule(weight.rows == macros[f"{name}_TILE"], "a tile's boxes")
            exact = weight.matrix.float()
        else:
            exact = unpacked(weight, bits, (channels, inputs)).float() * scales.float()[:, None]
        _rule(exact.shape == (channels, inputs), "a weight's shape")
        return lambda y: functional.linear(y.half().float(), exact, bias.float())

    dense, fc, proj, next_qkv = (
        products(index, name, *shape) for index, (name, shape) in enumerate(shapes.items())
    )

    def norm(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (width,), weight.float(), bias.float(), eps)

    x += dense(attended.matrix)
    normed_to.copy_(norm(*norms[:2]))
    hidden_to.copy_(fc(normed_to).relu())
    x += proj(hidden_to)
    normed_to.copy_(norm(*norms[2:]))
    qkv.copy_(next_qkv(normed_to))


def picture_linear(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    x: Boxes,
    weight: Boxes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: int,
    shared_bytes: int,
    cluster: int,
) -> None:
    """picture_linear.cu."""
    inputs, channels, split = macros["INPUTS"], macros["CHANNELS"], macros["SPLIT"]
    tile, row_tiles, parts = 64 * macros["WARPGROUPS"], macros["ROW_TILES"], macros["PARTS"]
    _rule(grid == (channels // tile * row_tiles, split), "blocks")
    _rule(threads == 2 * tile + 32 and cluster == row_tiles, "threads")
    _rule(channels % tile == 0 and inputs % 64 == 0 and split <= inputs // 64, "a linear's shape")
    _rule(row_tiles * 136 >= rows, "rows are left out")
    _rule(macros["DEPTH"] * ((tile + 136) * 128 + 16) <= shared_bytes, "shared memory")
    _rule(shared_bytes == macros["SHARED"] <= PROPERTIES.shared_memory_per_block_optin, "SHARED")
    _rule(x.matrix.shape == (rows, inputs) and x.rows == 136, "inputs")
    _rule(x.row_bytes == weight.row_bytes == 128, "boxes that the tensor cores cannot read")
    _rule(weight.matrix.shape == (channels, inputs) and weight.rows == tile // row_tiles, "weights")
    _rule(bool(parts) == (bias is None) and (parts or split == 1), "a bias, or parts")
    _rule(out.dtype == (torch.float32 if parts else torch.float16), "the outputs' type")
    _rule(out.shape == ((split, rows, channels) if parts else (rows, channels)), "outputs")
    values, factors = x.matrix.float(), weight.matrix.float()
    if parts:
        ends = [64 * (number * (inputs // 64) // split) for number in range(split + 1)]
        for number, (first, end) in enumerate(itertools.pairwise(ends)):
            out[number] = values[:, first:end] @ factors[:, first:end].T
        return
    y = functional.linear(values, factors, bias.float())
    out.copy_(functional.gelu(y, approximate="tanh") if macros["GELU"] else y)


def linear_many(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    x: Boxes,
    weight: Boxes,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rows: int,
    channels: int,
    inputs: int,
    splits: int,
    shared_bytes: int,
) -> None:
    """linear_many.cu."""
    bits, tile_rows, groups = macros["BITS"], macros["ROWS"], macros["WARPGROUPS"]
    pieces, parts = 4 * groups, macros["PARTS"]
    units = -(-channels // (64 * groups)) * -(-rows // tile_rows) * splits
    _rule(grid == (min(units, PROPERTIES.multi_processor_count), 1), "blocks")
    _rule(threads == {1: 160, 2: 384}[groups], "threads")
    _rule(inputs % 128 == 0 and splits <= inputs // 128, "an odd number of steps, or none")
    stage = 128 * (tile_rows + pieces * bits // 4 * 4)
    _rule(macros["DEPTH"] >= 2 and macros["DEPTH"] * (stage + 16) <= shared_bytes, "shared memory")
    _rule(shared_bytes == macros["SHARED"] <= PROPERTIES.shared_memory_per_block_optin, "SHARED")
    _rule(x.matrix.shape == (rows, inputs) and x.rows == tile_rows, "inputs")
    _rule(x.row_bytes == 128, "boxes that the tensor cores cannot read")
    _rule(weight.matrix.shape == (-(-channels // 16), inputs * bits // 2), "weights")
    _rule(weight.rows == pieces and weight.row_bytes == 128 * bits, "boxes of weights")
    _rule(bool(parts) == (bias is None) and (parts or splits == 1), "a bias, or parts")
    _rule(out.dtype == (torch.float32 if parts else torch.float16), "the outputs' type")
    _rule(out.numel() == splits * rows * channels, "outputs")
    packed = weight.matrix.contiguous().view(torch.uint8)
    shape = (8, 4, 2, 8) if bits == 8 else (8, 4, 2, 2, 4)
    factors = unpacked(packed.view(len(packed), -1, *shape), bits, (channels, inputs)).float()
    values = x.matrix.float()
    if macros["INPUTS_ORDERED"]:
        values[:, ordered(inputs)] = values.clone()
    ends = [128 * (number * (inputs // 128) // splits) for number in range(splits + 1)]
    for part, (first, end) in zip(
        out.view(splits, rows, channels), itertools.pairwise(ends), strict=True
    ):
        y = values[:, first:end] @ factors[:, first:end].T * scales.float()
        if parts:
            part.copy_(y)
            continue
        y += bias.float()
        y = y.relu() if macros["RELU"] else y
        part.copy_(y[:, ordered(channels)] if macros["RELU"] else y)


def ordered(count: int) -> torch.Tensor:
    """Which input lies at each of so many places, in the order of packed weights.

    A thread of four has eight in a row, of which the tensor cores want two and two.
    """
    of_thread = torch.arange(count).view(-1, 4, 2, 2, 2)  # 32s, thread, product, half of it, pair
    return of_thread.permute(0, 2, 3, 1, 4).flatten()


def marks(words: torch.Tensor) -> torch.Tensor:
    """step.cu's marks: the lowest bit of a float32, the sign of a float16."""
    if words.dtype == torch.float32:
        return words.view(torch.int32) & 1
    return (words.view(torch.int16) < 0).int()


def write_marks(words: torch.Tensor, mark: int) -> None:
    """Make all words some number with this mark."""
    if words.dtype == torch.float32:
        words.fill_(0.5).view(torch.int32).bitwise_or_(mark)
    else:
        words.fill_(-0.5 if mark else 0.5)


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The contiguous tensor of a type that lies at an address."""
    memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _rule(kept: Any, what: str) -> None:
    if not kept:
        raise AssertionError(f"a launch that no kernel takes: {what}")


def draw(
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    scores: torch.Tensor,
    settings: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    vocab_size: int,
    shared_bytes: int = 0,
) -> None:
    """draw.cu."""
    rows = len(scores)
    _rule(grid == (rows, 1) and threads == 1024, "rows")
    _rule(tuple(scores.shape) == (rows, vocab_size) and scores.is_contiguous(), "scores")
    _rule(scores.dtype == torch.float32, "the scores' type")
    _rule(tuple(settings.shape) == (rows, 4) and settings.is_contiguous(), "settings")
    _rule(settings.dtype == drawn.dtype == torch.float64 and drawn.shape == (rows,), "numbers")
    _rule(tokens.shape == (rows,) and tokens.dtype == torch.int64, "tokens")
    rest = macros["ELEMENTS"] - macros["HELD"]
    _rule(macros["ELEMENTS"] * threads >= vocab_size, "logits are left out")
    _rule(macros["HELD"] > 0 and shared_bytes == 4 * threads * rest, "shared memory")
    tokens.copy_(sampling.draw_tokens(scores, settings, drawn))


DOUBLES = {
    "attention.cu": attention,
    "draw.cu": draw,
    "linear.cu": linear,
    "linear_hopper.cu": linear,
    "linear_hopper_packed.cu": linear,
    "picture_linear.cu": picture_linear,
    "linear_many.cu": linear_many,
    "span.cu": span,
    "step.cu": step,
    "unpack.cu": unpack_weight,
}

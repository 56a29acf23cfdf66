"""linear_many.cu, and the layers of many rows that it computes, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from exact import (
    HALF,
    SUMS,
    ExactLinear,
    SameAttention,
    check_results_do_not_depend_on_timing,
    drawing,
    exact_norm,
    opt_config,
    random_opt,
    relative_error,
    settle,
)

from blip2.language.native import many_rows
from blip2.language.native.layers import Layers
from blip2.language.native.many_rows import CublasProducts, PackedProducts
from blip2.language.native.packing import PackedLinear

BITS = pytest.mark.parametrize("bits", [8, 4], ids=["8 bits", "4 bits"])


@pytest.fixture(autouse=True)
def hopper(device):
    if torch.cuda.get_device_properties(device).major != 9:
        pytest.skip("needs a Hopper")


def in_weights_order(x: torch.Tensor) -> torch.Tensor:
    """At 16 k + 8 i + 2 t + j of each 32 the column 8 t + 4 k + 2 i + j."""
    columns = [
        8 * t + 4 * k + 2 * i + j
        for k in range(2)
        for i in range(2)
        for t in range(4)
        for j in range(2)
    ]
    return x.unflatten(-1, (-1, 32))[..., columns].flatten(-2).contiguous()


@BITS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tile_rows", many_rows._ROWS)
# Channels that end within a block or fill several; the fewest inputs, and many.
@pytest.mark.parametrize("shape, splits", [((272, 128), 1), ((7680, 2560), 1), ((1056, 10240), 6)])
def test_linears_equal_float64(device, monkeypatch, bits, groups, tile_rows, shape, splits):
    """As every linear of a layer is computed, and the head; rows end within a tile or with it."""
    channels, inputs = shape
    for rows in (65, 2 * tile_rows, 5 * tile_rows - 3):
        draw = drawing(device, rows + channels)
        weight = draw(channels, inputs, spread=inputs**-0.5)
        exact, packed = ExactLinear.of(weight, draw(channels), bits)
        x = draw(rows, inputs) + 0.5
        truth, ordered = exact(x.double()), in_weights_order(x)
        products = PackedProducts()

        def forced(_shape, _rows, _device, *, has_parts: bool):
            return many_rows.Tile(tile_rows, groups, splits if has_parts else 1)

        monkeypatch.setattr(many_rows, "tile_for", forced)
        # Each tile has half of what macros make of the kernel, its neighbours the other half.
        second_half = (many_rows._ROWS.index(tile_rows) + groups) % 2 == 1
        out = torch.full((rows + 1, channels), math.nan, device=device, dtype=torch.float16)
        settle()
        relu = second_half and channels % 32 == 0
        products.linear(ordered, packed, out[:-1], relu=relu)
        check(out[:-1], in_weights_order(truth.relu()) if relu else truth, HALF)
        assert out[-1].isnan().all()
        without_bias = truth - exact.bias
        settle()
        taken = ordered if second_half else x
        parts = products.parts(taken, packed, is_ordered=second_half)
        assert parts.shape == (splits, rows, channels)
        check(parts.double().sum(0), without_bias, SUMS)
        if second_half:
            head = PackedLinear(packed.weight, packed.scales, None, bits, shape)
            out = torch.full((rows + 1, channels), math.nan, device=device)
            settle()
            products.linear(ordered, head, out[:-1], relu=False)
            check(out[:-1], without_bias, SUMS)
            assert out[-1].isnan().all()


def check(found: torch.Tensor, truth: torch.Tensor, bound: float) -> None:
    assert relative_error(found, truth) < bound
    rows = (found.double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert (rows < 2 * bound).all()


@BITS
@pytest.mark.parametrize("width", [128, 2560])
@pytest.mark.parametrize("rows", [65, 144, 384, 2880])
def test_layers_and_logits_equal_float64(device, bits, width, rows):
    config = opt_config(width, 1, layers=2, vocab_size=1000)
    exact, packed = random_opt(config, bits, device)
    layers = Layers(config, packed, rows, device)
    assert isinstance(layers._many, PackedProducts)
    draw = drawing(device, rows)
    stream, attention = draw(rows, width).float(), SameAttention(draw(rows, width))
    layers.x.copy_(stream)
    layers.run(attention)
    logits = torch.empty(rows, 1000, device=device)
    layers.logits(logits)
    x = stream.double()
    for layer, found in zip(exact.weights.layers, attention.qkv, strict=True):
        check(found, layer.qkv(exact_norm(x, layer.input_norm)), 1e-3)
        x = x + layer.dense(attention.mixed.double())
        x = x + layer.proj(layer.fc(exact_norm(x, layer.post_norm)).relu())
    check(layers.x, x, 5e-4)
    check(logits, exact.logits(x), 1e-3)


def test_results_do_not_depend_on_timing(device):
    config = opt_config(2560, 1, layers=2, vocab_size=64)
    _, packed = random_opt(config, 8, device)
    check_results_do_not_depend_on_timing(Layers(config, packed, 384, device), 384)


def test_what_else_goes_through_cublas(device):
    """Weights in 16 bits and FP8, and inputs that are not steps by twos."""
    for width, bits in ((128, None), (128, "float8"), (192, 4)):
        _, packed = random_opt(opt_config(width, 1, layers=1, vocab_size=64), bits, device)
        assert isinstance(many_rows.products_for(packed, device), CublasProducts)

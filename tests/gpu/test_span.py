"""span.cu, all that lies between two attentions, against float64."""

from __future__ import annotations

import pytest
import torch
from exact import (
    SameAttention,
    check_results_do_not_depend_on_timing,
    drawing,
    exact_norm,
    opt_config,
    random_opt,
    relative_error,
)

from blip2.language.native.layers import Layers
from blip2.language.native.span import Span

BITS = pytest.mark.parametrize("bits", [None, 8, 4], ids=["16 bits", "8 bits", "4 bits"])
# OPT-2.7B's is the largest; the smallest have fewer tiles than an H100 has blocks.
WIDTHS = pytest.mark.parametrize("width", [128, 384, 768, 2048, 2560])


@BITS
@WIDTHS
@pytest.mark.parametrize("rows", [9, 16, 33, 40, 64])
def test_all_between_two_attentions_equals_float64(device, monkeypatch, bits, width, rows):
    """The next queries, keys and values, and the residual stream, several times."""
    monkeypatch.setattr("blip2.language.native.layers._SEPARATE_ROWS", 8)
    config = opt_config(width, 1, layers=3, vocab_size=64)
    exact, packed = random_opt(config, bits, device)
    if torch.cuda.get_device_properties(device).major != 9:
        pytest.skip("needs a Hopper")
    layers = Layers(config, packed, rows, device)
    assert isinstance(layers._span, Span)
    draw = drawing(device, rows)
    attention = SameAttention(draw(rows, width))
    for _ in range(3):
        stream = draw(rows, width).float()
        layers.x.copy_(stream)
        attention.qkv.clear()
        layers._to_last_attention(attention)
        x = stream.double()
        for layer, following, found in zip(
            exact.weights.layers, exact.weights.layers[1:], attention.qkv[1:], strict=False
        ):
            x = x + layer.dense(attention.mixed.double())
            x = x + layer.proj(layer.fc(exact_norm(x, layer.post_norm)).relu())
            truth = following.qkv(exact_norm(x, following.input_norm))
            assert relative_error(found, truth) < 1e-3
            off = (found - truth).norm(dim=1) / truth.norm(dim=1)
            assert (off < 3e-3).all()
        assert len(attention.qkv) == 3
        assert relative_error(layers.x, x) < 5e-4


def test_results_do_not_depend_on_timing(device):
    config = opt_config(2560, 1, layers=3, vocab_size=64)
    _, packed = random_opt(config, 4, device)
    layers = Layers(config, packed, 64, device)
    if not layers._span:
        pytest.skip("needs a Hopper")
    check_results_do_not_depend_on_timing(layers, 64)

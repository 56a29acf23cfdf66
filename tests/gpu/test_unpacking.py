"""unpack.cu: the float16 weights that packed ones stand for, to the last bit."""

from __future__ import annotations

import pytest
import torch
from exact import drawing, fill_free_memory_with_nan

from blip2.language.native.linear import quantize
from blip2.language.native.packing import PackedLinear


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 64), (7, 64), (203, 192), (2560, 2560), (50265, 768)])
def test_unpacked_weights_are_the_quantised_ones(device, bits, shape):
    weight = drawing(device, shape[0])(*shape, spread=0.05)
    weight[0] = 0  # a channel whose scale is 0
    packed = PackedLinear.pack(weight, None, bits)
    values, scales = quantize(weight, bits)
    fill_free_memory_with_nan(device)
    assert torch.equal(packed.unpacked(), values.half() * scales.half()[:, None])


def test_weights_of_16_bits_are_what_they_were(device):
    weight = drawing(device)(203, 192)
    assert torch.equal(PackedLinear.pack(weight, None, None).unpacked(), weight)

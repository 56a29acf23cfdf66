"""The CPU's linears of 8 and 4 bits against arithmetic in float64, input rounding included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blip2.language.native.nbits import NBitsLinear


def rounded_weight(weight: torch.Tensor, bits: int) -> np.ndarray:
    """TensorRT-LLM's rounding, a scale a channel kept in float16: out x in, float64."""
    limit = 2 ** (bits - 1)
    exact = weight.double().numpy()
    scale = np.abs(exact).max(axis=1, keepdims=True) / limit
    steps = np.clip(np.sign(exact) * np.floor(np.abs(exact / scale) + 0.5), -limit, limit - 1)
    return steps * scale.astype(np.float16).astype(np.float64)


def rounded_inputs(x: torch.Tensor, block: int) -> np.ndarray:
    """Each `block` inputs to 8 bits with a scale of their own, as MatMulNBits takes them."""
    blocks = x.double().numpy().reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale).reshape(x.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs, block", [(256, 128), (192, 64), (96, 32)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_equals_float64_arithmetic(bits, inputs, block, rows):
    generator = torch.Generator().manual_seed(inputs + rows)
    weight = torch.randn(48, inputs, generator=generator).half()
    bias, x = torch.randn(48, generator=generator), torch.randn(rows, inputs, generator=generator)
    y = NBitsLinear.pack(weight, bias.half(), bits)(x).double().numpy()
    matrix = rounded_weight(weight, bits).T
    expected = rounded_inputs(x, block) @ matrix + bias.half().double().numpy()
    assert np.linalg.norm(y - expected) <= 1e-5 * np.linalg.norm(expected)
    unrounded = x.double().numpy() @ matrix + bias.half().double().numpy()
    assert np.linalg.norm(y - unrounded) <= 1e-2 * np.linalg.norm(unrounded)


def test_keeps_leading_dimensions_and_needs_no_bias():
    weight = torch.randn(32, 64).half()
    linear = NBitsLinear.pack(weight, None, 8)
    x = torch.randn(2, 5, 64)
    assert linear(x).shape == (2, 5, 32)
    torch.testing.assert_close(linear(x)[1, 3], linear(x[1, 3][None])[0], rtol=1e-4, atol=1e-4)

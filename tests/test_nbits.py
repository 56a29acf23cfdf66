"""The CPU's linears of 8 and 4 bits against arithmetic in float64, input rounding included."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from blip2.language.native import nbits
from blip2.language.native.nbits import NBitsLinear, NBitsPacker


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


def packed_model(linears: int, bits: int) -> list[tuple[torch.Tensor, NBitsLinear]]:
    """Weights of all sizes that an OPT has, and what packing them side by side makes of them."""
    packer = NBitsPacker(linears)
    sizes = [(96, 64), (32, 64), (128, 64), (64, 128)]
    weights = [torch.randn(sizes[number % 4]).half() for number in range(linears)]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(lambda weight: packer.pack(weight, None, bits), weights))
    packer.finish()
    return list(zip(weights, packed, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_each_linear_of_a_model_computes_what_it_does_alone(bits):
    for weight, linear in packed_model(29, bits):
        for rows in (1, 3):
            x = torch.randn(rows, weight.shape[1])
            assert torch.equal(linear(x), NBitsLinear.pack(weight, None, bits)(x))


def test_linears_can_be_used_when_fewer_came_than_announced():
    packer, weight, x = NBitsPacker(40), torch.randn(32, 64).half(), torch.randn(2, 64)
    linears = [packer.pack(weight, None, 8) for _ in range(7)]
    packer.finish()
    packer.finish()
    alone = NBitsLinear.pack(weight, None, 8)(x)
    assert all(torch.equal(linear(x), alone) for linear in linears)


def test_one_session_is_made_at_a_time(monkeypatch):
    """Or the weights of several would be in memory twice."""
    making, most, make = [], [], nbits._session

    def slow(rounded):
        making.append(rounded)
        most.append(len(making))
        time.sleep(0.02)
        session = make(rounded)
        making.remove(rounded)
        return session

    monkeypatch.setattr(nbits, "_session", slow)
    packed_model(29, 8)
    assert most == [1] * 8

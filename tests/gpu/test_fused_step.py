"""step.cu, a decoding step of one row as one kernel, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from exact import (
    HALF,
    ExactOPT,
    bits_of,
    drawing,
    fill_free_memory_with_nan,
    opt_config,
    random_opt,
    relative_error,
)

from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.fused_step import FusedStep, macros_for, shape_macros

STEPS = 3
MAX_LEN = 512
# Of OPT-2.7B's slots ten warps attend to 30 at a time, the first two times ahead of the query.
LENGTHS = (1, 29, 30, 60, 61, 200, MAX_LEN - STEPS)

OPT_2_7B, OPT_6_7B = (2560, 32), (4096, 32)


@pytest.fixture(
    scope="module",
    params=[
        (*OPT_2_7B, None, 50272),
        (*OPT_2_7B, 8, 50272),
        (*OPT_2_7B, 4, 50265),  # a packed head's last tile need not be full
        (*OPT_6_7B, None, 50272),
        (*OPT_6_7B, 8, 50272),
        (*OPT_6_7B, 4, 50272),
        (640, 8, 4, 1000),  # fewer blocks than multiprocessors, and not all of them share dense
        (512, 8, None, 1008),  # heads of 64
    ],
    ids=lambda shape: f"{shape[0]} wide, {shape[2] or 16} bits",
)
def models(request, device) -> tuple[ExactOPT, OPTWeights]:
    """A model of an odd number of layers: marks are then another at every step."""
    width, heads, bits, vocab_size = request.param
    return random_opt(opt_config(width, heads, 3, vocab_size), bits, device)


def make_step(models, device, multiprocessors: int | None = None) -> tuple[CudaCache, FusedStep]:
    """As on a GPU of so many multiprocessors; None: as on this one."""
    exact, packed = models
    fill_free_memory_with_nan(device)
    macros = macros_for(exact.config, packed, 1, device)
    if macros is None:
        pytest.skip("step.cu is for Hopper and later")
    if multiprocessors is not None:
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        bits = (macros["BITS"], macros["HEAD_BITS"])
        macros = shape_macros(exact.config, bits, multiprocessors, shared)
    cache = CudaCache(exact.config, 1, MAX_LEN, device)
    return cache, FusedStep(exact.config, packed, cache, macros)


def fill(cache: CudaCache, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As if so many tokens had been read; behind them is NaN. Returns keys and values in float64."""
    draw = drawing(device, length)
    for tensor in (cache.keys, cache.values):
        tensor.fill_(math.nan)
        tensor[:, :, :, :length] = draw(*tensor[:, :, :, :length].shape)
    cache.lengths.fill_(length)
    return tuple(tensor[:, :, :, :length].double() for tensor in (cache.keys, cache.values))


def test_steps_equal_float64(models, device):
    """Several in a row: logits, what is written to the cache, and nothing else there."""
    exact, _ = models
    cache, step = make_step(models, device)
    generator = torch.Generator().manual_seed(1)
    for length in LENGTHS:
        keys, values = fill(cache, length, device)
        for position in range(length, length + STEPS):
            before = [bits_of(cached).clone() for cached in (cache.keys, cache.values)]
            token = torch.randint(0, exact.config.vocab_size, (1,), generator=generator).to(device)
            logits = step(token)
            x, keys, values = exact.read(exact.words(token)[None], keys, values)
            assert relative_error(logits, exact.logits(x[:, -1])) < 4 * HALF
            written = (cache.keys, keys), (cache.values, values)
            for (cached, truth), old in zip(written, before, strict=True):
                found, new = cached[:, :, :, position], truth[:, :, :, position]
                assert relative_error(found[0], new[0]) < 2 * HALF  # of the first layer
                assert relative_error(found, new) < 4 * HALF
                same = bits_of(cached) == old
                same[:, :, :, position] = True
                assert same.all()
            assert cache.lengths.item() == position + 1


def test_blocks_with_many_tiles(models, device):
    """As on a small GPU: up to eight tiles of dense and of proj a block."""
    exact, _ = models
    cache, step = make_step(models, device, multiprocessors=40)
    keys, values = fill(cache, 45, device)
    for number in (3, 70, 500):
        token = torch.tensor([number], device=device)
        x, keys, values = exact.read(exact.words(token)[None], keys, values)
        assert relative_error(step(token), exact.logits(x[:, -1])) < 4 * HALF


def test_steps_do_not_depend_on_timing(models, device):
    """Blocks tell one another parts of sums: always the same ones, in whatever order they come."""
    cache, step = make_step(models, device)
    fill(cache, 45, device)
    tokens = torch.tensor([[3], [70], [500]], device=device)
    runs = []
    for _ in range(30):
        cache.lengths.fill_(45)
        runs.append(torch.stack([step(token).clone() for token in tokens]))
    assert runs[0].isfinite().all()
    for run in runs[1:]:
        assert torch.equal(run, runs[0])

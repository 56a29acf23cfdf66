"""linear.cu, linear_hopper.cu and linear_hopper_packed.cu in every variant, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from exact import HALF, SUMS, ExactLinear, drawing, opt_config, relative_error, settle

from blip2.language.native import layers
from blip2.language.native.layers import Layers
from blip2.language.native.packing import PackedLinear

BITS = pytest.mark.parametrize("bits", [None, 8, 4], ids=["16 bits", "8 bits", "4 bits"])
# Channels that are no multiple of a tile's 16 or a block's 128; so few inputs that warps have none.
ODD = (203, 192)
# What each of the two kinds is given; of Hopper's also such that clusters have every size.
SHAPES = [(40, 64), ODD, (4104, 320), (2560, 2560)]
HOPPER_SHAPES = [(200, 64), (136, 704), (20000, 320), (2560, 2560), (7680, 2560), (2560, 10240)]


class Case:
    """A random linear and inputs, its sums large and small, and what they should become."""

    def __init__(
        self,
        device: torch.device,
        bits: int | None,
        rows: int,
        shape: tuple[int, int],
        *,
        relu: bool = False,
        residual: bool = False,
        biased: bool = True,
    ) -> None:
        channels, inputs = shape
        draw = drawing(device, rows + channels)
        weight = draw(channels, inputs, spread=inputs**-0.5)
        bias = draw(channels) if biased else None
        exact, self.packed = ExactLinear.of(weight, bias, bits)
        # Their mean is not 0, as behind ReLU: what packed weights are biased by must cancel out.
        self.x = draw(rows, inputs) + 0.5
        self.relu, self.residual = relu, residual
        # The head's and the residual stream's are floats. A row more, to see that it is left alone.
        floats = residual or not biased
        dtype = torch.float32 if floats else torch.float16
        self.out = torch.full((rows + 1, channels), math.nan, dtype=dtype, device=device)
        self.truth = exact(self.x.double())
        if relu:
            self.truth = self.truth.relu()
        if residual:
            self.out[:-1] = draw(rows, channels)
            self.truth += self.out[:-1].double()
        self.bound = SUMS if floats else HALF

    def check(self, kernels: Layers) -> None:
        out = self.out[:-1]
        settle()
        kernels._launch(self.x, self.packed, out, relu=self.relu, residual=self.residual)
        assert relative_error(out, self.truth) < self.bound
        rows = (out.double() - self.truth).norm(dim=1) / self.truth.norm(dim=1)
        assert (rows < 2 * self.bound).all()
        assert self.out[-1].isnan().all()


# As OPT's linears are: dense and proj, qkv, fc, and the head. Each is tried with every other variant.
MODES = [{"residual": True}, {}, {"relu": True}, {"biased": False}]


def rows_of(tiles: int, others: tuple[int, ...]) -> list[int]:
    """The most, the fewest and another number of rows that go to a variant of so many tiles."""
    fewer = max((n for n in others if n < tiles), default=0)
    return sorted({8 * fewer + 1, 8 * tiles - 3, 8 * tiles})


def kernels_for(rows: int, device: torch.device, hopper: bool) -> Layers:
    kernels = Layers(opt_config(64, 1), None, rows, device)
    if hopper and not kernels._hopper:
        pytest.skip("needs a Hopper")
    kernels._hopper = hopper
    return kernels


@BITS
@pytest.mark.parametrize("tiles", layers._TILES)
def test_linears_equal_float64(device, bits, tiles):
    for rows in rows_of(tiles, layers._TILES):
        kernels = kernels_for(rows, device, hopper=False)
        for mode in MODES[layers._TILES.index(tiles) % 2 :: 2]:
            Case(device, bits, rows, ODD, **mode).check(kernels)
        for shape, mode in zip(SHAPES, MODES, strict=True):
            Case(device, bits, rows, shape, **mode).check(kernels)


@BITS
def test_long_sums_equal_float64(device, bits):
    """OPT-2.7B's proj: the most inputs."""
    for rows in (1, 8, 64):
        Case(device, bits, rows, (2560, 10240), residual=True).check(
            kernels_for(rows, device, hopper=False)
        )


@BITS
@pytest.mark.parametrize("tiles", layers._HOPPER_TILES)
def test_hoppers_linears_equal_float64(device, bits, tiles):
    for rows in rows_of(tiles, (1, *layers._HOPPER_TILES)):
        kernels = kernels_for(rows, device, hopper=True)
        for mode in MODES[layers._HOPPER_TILES.index(tiles) % 2 :: 2]:
            Case(device, bits, rows, ODD, **mode).check(kernels)
        for index, shape in enumerate(HOPPER_SHAPES):
            Case(device, bits, rows, shape, **MODES[(index + tiles) % 4]).check(kernels)


def test_clusters_of_every_size_are_among_these(device):
    if torch.cuda.get_device_properties(device).multi_processor_count != 132:
        pytest.skip("the shapes are chosen for an H100's multiprocessors")
    splits = {layers._split(n, k // 64, 132) for n, k in [ODD, *HOPPER_SHAPES]}
    assert splits == set(layers._SPLITS)


@BITS
def test_every_value_of_a_weight_is_read(device, bits):
    """Also the most negative one, which has no positive counterpart."""
    limit = 8 if bits == 4 else 128
    values = torch.arange(-limit, limit, device=device).half().repeat(128 // limit)
    weight = torch.stack([values.roll(n) for n in range(48)])
    exact, packed = ExactLinear.of(weight, None, bits)
    x = torch.eye(256, device=device).half()[:64]
    for rows in (8, 64):
        for hopper in (False, True):
            kernels = Layers(opt_config(64, 1), None, rows, device)
            if hopper and not kernels._hopper:
                continue
            kernels._hopper = hopper
            out = torch.empty(rows, 48, device=device)
            settle()
            kernels._launch(x[:rows].contiguous(), packed, out)
            assert torch.equal(out.double(), exact(x[:rows].double()))


@BITS
@pytest.mark.parametrize("rows", [1, 8, 40, 64])
def test_linears_are_the_same_every_time(device, bits, rows):
    kernels = Layers(opt_config(64, 1), None, rows, device)
    draw = drawing(device)
    packed = PackedLinear.pack(draw(2560, 2560), draw(2560), bits)
    x, outs = draw(rows, 2560), torch.empty(20, rows, 2560, dtype=torch.float16, device=device)
    settle()
    for out in outs:
        kernels._launch(x, packed, out)
    assert outs[0].isfinite().all()
    assert (outs == outs[0]).all()

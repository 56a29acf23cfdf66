"""Linears of many rows from packed weights, on a double of their kernel; tests/gpu has the kernel."""

from __future__ import annotations

import dataclasses

import gpu_double
import pytest
import torch
from test_cuda_kernels import CONFIG, random_models, relative_error

from blip2.gpu import compiled
from blip2.language.native import many_rows
from blip2.language.native.linear import FloatLinear
from blip2.language.native.packing import PackedLinear

pytestmark = pytest.mark.usefixtures("gpu_double")

CPU = torch.device("cpu")
# OPT-2.7B's linears, channels x inputs, and whether others add up what they give.
LINEARS = {
    "qkv": ((7680, 2560), False),
    "dense": ((2560, 2560), True),
    "fc": ((10240, 2560), False),
    "proj": ((2560, 10240), True),
    "head": ((50272, 2560), False),
}


@pytest.mark.parametrize("bits", [8, 4])
def test_prompts_and_steps_of_many_rows_equal_the_reference(bits, monkeypatch):
    launched = gpu_double.count_launches(monkeypatch)
    config = dataclasses.replace(CONFIG, hidden_size=256)
    reference, packed = random_models(bits, config=config)
    heads = (  # as beside layers in 8 and 4 bits
        linear.pack(packed.weights.head.weight, None, 8) for linear in (FloatLinear, PackedLinear)
    )
    reference, packed = (
        type(model)(config, dataclasses.replace(model.weights, head=head))
        for model, head in zip((reference, packed), heads, strict=True)
    )
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(0, 90, (3, 40), generator=generator)
    lengths = torch.tensor([40, 33, 37])
    table = torch.zeros(3, 0, config.hidden_size)
    caches = [model.new_cache(lengths, 23, 8) for model in (reference, packed)]
    expected, got = (
        model.prefill(input_ids, lengths, table, cache)
        for model, cache in zip((reference, packed), caches, strict=True)
    )
    assert relative_error(got, expected) < 3e-3
    # Two layers' qkv, of the first what follows; what follows the last is of three rows.
    assert launched["linear_many.cu"] == 5
    for _ in range(2):
        tokens = torch.randint(0, 90, (69,), generator=generator)
        expected = reference.step(tokens, caches[0])
        got = packed.step(tokens, caches[1])
        assert relative_error(got, expected) < 3e-3
    assert launched["linear_many.cu"] == 5 + 2 * 9
    assert launched["unpack.cu"] == 0


@pytest.mark.parametrize("name", LINEARS)
def test_tiles_fill_an_h100(name):
    """Whatever the rows, blocks compute no more than 2.5 times what they are for."""
    shape, has_parts = LINEARS[name]
    for rows in (*range(65, 400, 5), 577, 720, 1080, 2880):
        tile = many_rows.tile_for(shape, rows, CPU, has_parts=has_parts)
        assert has_parts or tile.splits == 1
        tiles = -(-shape[0] // (64 * tile.groups)) * -(-rows // tile.rows)
        waves = -(-tiles * tile.splits // 132)
        computed = waves * 132 / tile.splits * tile.rows * tile.groups * 64
        assert rows * shape[0] / computed > 0.4, rows


def test_few_inputs_are_shared_out_by_no_more_blocks():
    assert many_rows.tile_for((128, 128), 65, CPU, has_parts=True).splits == 1
    assert many_rows.tile_for((128, 256), 65, CPU, has_parts=True).splits == 2


def test_inputs_in_the_weights_order_are_not_cublas_s():
    linear = PackedLinear.pack(torch.ones(128, 128).half(), torch.ones(128).half(), 8)
    x = torch.ones(65, 128).half()
    with pytest.raises(ValueError, match="as they come"):
        many_rows.CublasProducts().parts(x, linear, is_ordered=True)


def macros(bits: int, tile: tuple[int, int, int], how: str) -> dict[str, int]:
    flags = {"is_ordered": how != "dense", "has_parts": how in ("dense", "proj")}
    return many_rows.macros_for(bits, many_rows.Tile(*tile), 227 << 10, relu=how == "fc", **flags)


@pytest.mark.parametrize(
    "bits, tile, how",
    [
        (8, (256, 2, 1), "proj"),
        (4, (96, 1, 1), "qkv"),
        (8, (160, 2, 1), "fc"),
        (4, (224, 2, 3), "dense"),
    ],
)
def test_the_kernel_compiles(bits, tile, how):
    chosen = tuple(macros(bits, tile, how).items())
    assert compiled.compile_source(many_rows.SOURCE, chosen, "sm_90a")


@pytest.mark.parametrize(
    "changes, what",
    [({"DEPTH": 9}, "shared memory is too small"), ({"ROWS": 100}, "multiples of 1024")],
)
def test_the_kernel_does_not_compile_with_what_would_break_it(changes, what):
    chosen = macros(8, (256, 2, 1), "proj") | changes
    with pytest.raises(RuntimeError, match=what):
        compiled.compile_source(many_rows.SOURCE, tuple(chosen.items()), "sm_90a")

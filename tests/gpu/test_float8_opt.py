"""OPT in FP8 on a GPU: its linears and the whole, against float64 on the very values they multiply."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from exact import (
    HALF,
    SUMS,
    ExactLinear,
    ExactOPT,
    drawing,
    fill_free_memory_with_nan,
    opt_config,
    random_opt,
    relative_error,
    settle,
)
from test_cuda_model import OPT_2_7B, Texts, open_cache, run

from blip2.float8 import quantise
from blip2.gpu.float8 import Float8, product_dtype
from blip2.language.native.checkpoint import Norm, OPTWeights
from blip2.language.native.cuda import CudaModel
from blip2.language.native.float8_layers import Float8Layers, layers_for
from blip2.language.native.fused_step import macros_for
from blip2.language.native.layers import FEW_ROWS, Layers
from blip2.language.native.packing import PackedLinear

# Sums within the tensor cores keep 14 bits.
SUMS_OF_FLOAT8 = 2e-3
# Of a layer. What an input is off by in float16 decides which way it is rounded to E4M3; errors grow
# from layer to layer until they are those of rounding.
APART = 5e-2
NEAR = 3e-3  # of one linear
# Channels that are no multiple of a block's 128, inputs that are none of a step's 128, and OPT-2.7B's.
SHAPES = [
    (203, 192),
    (200, 64),
    (136, 704),
    (7680, 2560),
    (2560, 2560),
    (10240, 2560),
    (2560, 10240),
]


@pytest.fixture(autouse=True)
def on_a_gpu_with_float8(device):
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no FP8")


def linear_of(device: torch.device, shape: tuple[int, int]) -> tuple[ExactLinear, PackedLinear]:
    """Of channels of very different sizes."""
    draw = drawing(device, shape[0])
    weight = draw(*shape, spread=shape[1] ** -0.5)
    weight *= torch.logspace(-2, 1, shape[0], device=device).half()[:, None]
    return ExactLinear.of(weight, draw(shape[0]), "float8")


def assert_near(out: torch.Tensor, truth: torch.Tensor, sizes: torch.Tensor) -> None:
    """Each by itself, for rows and channels are of all sizes; `sizes` are those of what is added up."""
    assert relative_error(out, truth) < SUMS_OF_FLOAT8
    assert ((out.double() - truth).abs() <= SUMS_OF_FLOAT8 * sizes).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_few_rows_are_multiplied_in_16_bits(device, shape, rows):
    exact, packed = linear_of(device, shape)
    x = drawing(device, rows)(rows, shape[1]) + 0.5
    kernels = Layers(opt_config(64, 1), None, rows, device)
    for relu, residual in ((False, False), (True, False), (False, True)):
        truth = exact(x.double())
        truth = truth.relu() if relu else truth
        dtype = torch.float32 if residual else torch.float16
        out = torch.full((rows + 1, shape[0]), math.nan, dtype=dtype, device=device)
        if residual:
            out[:-1] = drawing(device, 9)(rows, shape[0])
            truth += out[:-1].double()
        settle()
        kernels._launch(x, packed, out[:-1], relu=relu, residual=residual)
        assert relative_error(out[:-1], truth) < (SUMS if residual else HALF)
        assert out[-1].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [9, 16, 29, 40, 48, 61, 64])
def test_more_rows_are_multiplied_by_hoppers_kernel(device, shape, rows):
    """As they are in FP8, each with its own scale."""
    kernels = Layers(opt_config(64, 1), None, rows, device)
    if not kernels._hopper:
        pytest.skip("needs a Hopper")
    exact, packed = linear_of(device, shape)
    x = drawing(device, rows)(rows, shape[1]) + 0.5
    x *= torch.logspace(-1, 1, rows, device=device).half()[:, None]
    rounded = Float8.of(x)
    inputs = rounded.values.double() * rounded.scales.double()[:, None]
    sizes = inputs.norm(dim=1)[:, None] * exact.weight.norm(dim=1) + exact.bias.abs()
    for relu, residual in ((False, False), (True, False), (False, True)):
        truth = exact(inputs)
        truth = truth.relu() if relu else truth
        dtype = torch.float32 if residual else torch.float16
        out = torch.full((rows + 1, shape[0]), math.nan, dtype=dtype, device=device)
        if residual:
            out[:-1] = drawing(device, 9)(rows, shape[0])
            truth += out[:-1].double()
        settle()
        scales = rounded.scales
        kernels._launch(
            rounded.values, packed, out[:-1], relu=relu, residual=residual, row_scales=scales
        )
        assert_near(out[:-1], truth, sizes + truth.abs())
        assert out[-1].isnan().all()


@pytest.mark.parametrize("rows", [2, 64])
def test_every_value_of_e4m3_is_read(device, rows):
    bytes_ = torch.arange(256, dtype=torch.uint8, device=device)
    bytes_ = torch.where(bytes_ % 128 == 127, 0, bytes_)  # NaN
    values = torch.stack([bytes_.roll(n) for n in range(48)]).view(torch.float8_e4m3fn)
    packed = PackedLinear.of_float8(values, torch.ones(48, device=device), None)
    kernels = Layers(opt_config(64, 1), None, rows, device)
    out = torch.empty(rows, 48, device=device)
    settle()
    for first in range(0, 256, rows):
        x = torch.eye(256, device=device)[first : first + rows]
        if rows > FEW_ROWS and kernels._hopper:
            ones = torch.ones(rows, device=device)
            kernels._launch(x.to(torch.float8_e4m3fn), packed, out, row_scales=ones)
        else:
            kernels._launch(x.half(), packed, out)
        assert torch.equal(out.double(), values[:, first : first + rows].double().T)


class RoundingLinear(ExactLinear):
    """Rounds its inputs to E4M3 by token while `rounds` is set."""

    rounds = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if RoundingLinear.rounds:
            values, scales = quantise(x)
            x = values.double() * scales.double()
        return super().__call__(x)


def rounded(x: torch.Tensor) -> torch.Tensor:
    values, scales = quantise(x)
    return values.double() * scales.double()


@pytest.mark.parametrize("rows", [9, 48, 64, 90, 360])
def test_a_layer_rounds_the_inputs_of_each_linear(device, rows):
    """Each linear alone, on what was computed before it: by kernels of our own, and cuBLAS."""
    width, heads = OPT_2_7B
    exact, packed = random_opt(opt_config(width, heads, layers=1), "float8", device)
    [truth], [layer] = exact.weights.layers, packed.layers
    layers = Float8Layers(exact.config, packed, rows, device)
    x = drawing(device)(rows, width).float()
    layers.x.copy_(x)
    found = {}

    def attention(_index: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        found["qkv"] = qkv.double()
        attended.copy_(qkv[:, :width])

    def norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return F.layer_norm(x.double(), (width,), norm.weight, norm.bias, 1e-5)

    half = 1 if product_dtype(device) == torch.float16 else 8
    layers._attend(0, attention)
    assert relative_error(found["qkv"], truth.qkv(rounded(norm(x, truth.input_norm)))) < NEAR * half
    attended = layers._attended.double()
    layers._add(layers._attended, layer.dense)
    stream = layers._residual.summed().clone()
    assert relative_error(stream.double() - x, truth.dense(rounded(attended))) < NEAR * half
    hidden = layers._multiply(layers._norms[0][1](layers._residual), layer.fc, layers._hidden)
    found = truth.fc(rounded(norm(stream, truth.post_norm)))
    assert relative_error(hidden, found) < NEAR * half
    layers._add(hidden, layer.proj, "relu")
    added = layers._residual.summed().double() - stream
    assert relative_error(added, truth.proj(rounded(hidden.double().relu()))) < NEAR * half


@pytest.fixture(scope="module", params=[1, 2], ids=["1 layer", "2 layers"])
def models(request, device) -> tuple[ExactOPT, OPTWeights]:
    width, heads = OPT_2_7B
    exact, packed = random_opt(opt_config(width, heads, layers=request.param), "float8", device)
    for layer in exact.weights.layers:
        for name in ("qkv", "dense", "fc", "proj"):
            object.__setattr__(layer, name, RoundingLinear(**vars(getattr(layer, name))))
    return exact, packed


def bound_of(exact: ExactOPT) -> float:
    return APART * exact.config.num_hidden_layers


@pytest.mark.parametrize("requests, num_beams", [(9, 1), (10, 5), (64, 1), (80, 1)])
def test_many_rows_equal_float64(models, device, monkeypatch, requests, num_beams):
    """Prompts and steps, in memory that held NaN: all inputs are rounded."""
    exact, packed = models
    texts = Texts(exact, requests, num_beams, device)
    fill_free_memory_with_nan(device)
    model = CudaModel(exact.config, packed)
    monkeypatch.setattr(RoundingLinear, "rounds", True)
    bound = bound_of(exact) * (1 if product_dtype(device) == torch.float16 else 2)
    for step, logits in enumerate(run(model, open_cache(model, texts), texts)):
        if step > 0:
            texts.append(texts.tokens[step - 1])
        truth = texts.truth()[0][:: 1 if step else num_beams]
        rows = (logits.double() - truth).norm(dim=1) / truth.norm(dim=1)
        assert (rows < bound).all()
        if step > 0 and num_beams > 1:
            texts.x = texts.x[texts.source_rows[step - 1]]


@pytest.mark.parametrize("num_beams", [1, 5], ids=["one kernel", "layer by layer"])
def test_steps_of_few_rows_equal_float64(models, device, monkeypatch, num_beams):
    """Behind a prompt that was rounded, whose keys and values are taken as they are."""
    exact, packed = models
    texts = Texts(exact, 1, num_beams, device)
    fill_free_memory_with_nan(device)
    model = CudaModel(exact.config, packed)
    assert (model.fused_step(model.new_cache(texts.lengths, 1, 2)) is not None) == (
        torch.cuda.get_device_capability(device)[0] >= 9
    )
    cache = open_cache(model, texts)
    logits = model.prefill(texts.ids, texts.lengths, texts.table.float(), cache)
    length = int(texts.lengths)
    with monkeypatch.context() as patch:
        patch.setattr(RoundingLinear, "rounds", True)
        truth, keys, values = texts.truth()
    assert relative_error(logits, truth[:1]) < 0.1  # the last token's last MLP was not rounded
    kept = []
    for found, wanted in ((cache.keys, keys), (cache.values, values)):
        kept.append(found[:, :1, :, :length].double())
        assert relative_error(kept[-1], wanted[:, :1, :, :length]) < bound_of(exact)
    keys, values = (part.expand(-1, num_beams, -1, -1, -1) for part in kept)
    for tokens in texts.tokens:
        hidden, keys, values = exact.read(exact.words(tokens)[:, None], keys, values)
        assert relative_error(model.step(tokens, cache), exact.logits(hidden[:, 0])) < 4 * HALF


def test_answers_are_the_same_every_time(models, device):
    exact, packed = models
    for requests in (1, 8, 40, 80):
        texts = Texts(exact, requests, 1, device)
        model = CudaModel(exact.config, packed)
        first, second = (
            [logits.clone() for logits in run(model, open_cache(model, texts), texts)]
            for _ in range(2)
        )
        for logits, others in zip(first, second, strict=True):
            assert logits.isfinite().all()
            assert torch.equal(logits, others)


def test_who_multiplies_what(models, device):
    exact, packed = models
    assert isinstance(layers_for(exact.config, packed, 9, device), Float8Layers)
    assert type(layers_for(exact.config, packed, 8, device)) is Layers
    fused = macros_for(exact.config, packed, 1, device)
    assert (fused is not None) == (torch.cuda.get_device_capability(device)[0] >= 9)

"""The GPU's ViT and Q-Former, run on a CPU by Triton's interpreter, against `modules.py`."""

from __future__ import annotations

import copy

import gpu_double
import kernel_doubles
import pytest
import torch
from conftest import compiled_launches
from models import with_random_weights

pytest.importorskip("triton")

from blip2.checkpoints import QFormerConfig, VisionConfig
from blip2.gpu import float8_kernels
from blip2.gpu.float8 import Float8
from blip2.vision import cuda_picture, kernels, modules
from blip2.vision.cuda import CudaQFormer, CudaVisionTransformer
from blip2.vision.cuda_picture import PictureLayer
from blip2.vision.float8 import quantise_linears

pytestmark = pytest.mark.usefixtures("gpu_double")


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize(
    "head_size, patches, changes",
    [(24, 3, {}), (16, 8, {}), (8, 2, {"qkv_bias": False, "hidden_act": "quick_gelu"})],
)
def test_vit_equals_the_modules(head_size, patches, changes):
    config = VisionConfig(
        hidden_size=2 * head_size,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=6 * patches,
        patch_size=6,  # 108 pixels, which cuBLAS wants padded
        **changes,
    )
    module = with_random_weights(modules.VisionTransformer(config))
    pixel_values = torch.randn(2, 3, config.image_size, config.image_size)
    expected = module.double()(pixel_values.double())
    output = CudaVisionTransformer(module.float())(pixel_values)
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1e-5
    pixel_values[1, 0, 3, 3] = torch.nan
    spoiled = CudaVisionTransformer(module)(pixel_values)
    assert torch.equal(spoiled[0], output[0])
    assert spoiled[1].isnan().any()


def vit_of_whole_tiles(patches: int, **changes: object) -> modules.VisionTransformer:
    """In float16, with products that picture_linear.cu takes, unless they are changed."""
    config = VisionConfig(
        **{"hidden_size": 128, "intermediate_size": 128} | changes,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=6 * patches,
        patch_size=6,
    )
    return with_random_weights(modules.VisionTransformer(config)).half()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("patches", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_one_picture_has_products_of_its_own(patches, monkeypatch):
    """On a Hopper; beside several pictures it has not."""
    launched = gpu_double.count_launches(monkeypatch)
    module = vit_of_whole_tiles(patches)
    fast = CudaVisionTransformer(copy.deepcopy(module))
    pixel_values = torch.randn(2, 3, 6 * patches, 6 * patches).half()
    expected = module.double()(pixel_values.double())
    assert relative_error(fast(pixel_values[:1]), expected[:1]) < 2e-3
    assert launched == {"picture_linear.cu": 8}  # four of each layer
    assert relative_error(fast(pixel_values), expected) < 2e-3
    assert launched == {"picture_linear.cu": 8}


def test_the_products_of_one_picture_are_those_that_its_kernel_takes(monkeypatch):
    takes = PictureLayer.takes
    assert takes(vit_of_whole_tiles(3).encoder.layers[0])
    assert not takes(vit_of_whole_tiles(3).float().encoder.layers[0])
    for changes in (
        {"intermediate_size": 72},
        {"hidden_size": 96},
        {"hidden_act": "quick_gelu"},
        {"qkv_bias": False},
    ):
        assert not takes(vit_of_whole_tiles(3, **changes).encoder.layers[0]), changes
    in_8_bits = vit_of_whole_tiles(3)
    quantise_linears(in_8_bits.encoder)
    assert not takes(in_8_bits.encoder.layers[0])
    monkeypatch.setattr(kernel_doubles.PROPERTIES, "major", 10)
    assert not takes(vit_of_whole_tiles(3).encoder.layers[0])


def test_the_products_of_one_picture_are_shared_out():
    """ViT-g's 257 tokens, on the 132 multiprocessors of an H100: to as many blocks as can be."""
    shapes = {
        "qkv": (4224, 1408),
        "projection": (1408, 1408),
        "fc1": (6144, 1408),
        "fc2": (1408, 6144),
    }
    found = {}
    for name, shape in shapes.items():
        weight = torch.empty(shape, device="meta")
        macros = cuda_picture.macros_for(weight, 264, has_parts=shape[0] == 1408)
        blocks = shape[0] // (64 * macros["WARPGROUPS"]) * macros["ROW_TILES"] * macros["SPLIT"]
        found[name] = macros["WARPGROUPS"], macros["SPLIT"], macros["DEPTH"], blocks
    assert found == {
        "qkv": (1, 1, 9, 132),
        "projection": (1, 3, 9, 132),
        "fc1": (2, 1, 6, 96),
        "fc2": (1, 3, 9, 132),
    }


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"SHARED": 200 << 10}, "shared memory is too small"),
        ({"CHANNELS": 4256}, "a linear's shape"),
        ({"INPUTS": 1440}, "a linear's shape"),
        ({"SPLIT": 2}, "whose sums nobody adds up"),
        ({"SPLIT": 23, "PARTS": 1}, "blocks without inputs"),
    ],
)
def test_a_linear_of_one_picture_does_not_compile_with_what_would_break_it(changes, what):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    weight = torch.empty(4224, 1408, device="meta")
    macros = cuda_picture.macros_for(weight, 264, has_parts=False) | {"GELU": 0}
    compiled.compile_source(cuda_picture.SOURCE, tuple(macros.items()), "sm_90a")
    with pytest.raises(RuntimeError, match=what):
        compiled.compile_source(cuda_picture.SOURCE, tuple((macros | changes).items()), "sm_90a")


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize(
    "float8, hidden_act",
    [
        pytest.param({0, 1, 2}, "gelu", marks=pytest.mark.slow),
        ({1}, "gelu"),
        pytest.param({0, 2}, "gelu", marks=pytest.mark.slow),
        ({0, 1}, "quick_gelu"),
    ],
)
def test_vit_in_float8_equals_the_modules(float8, hidden_act, monkeypatch):
    """Layers in 8 bits before, behind and between those in 16."""
    monkeypatch.setattr("blip2.gpu.float8.product_dtype", lambda _device: torch.float32)
    config = VisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=6,
        hidden_act=hidden_act,
        qkv_bias=hidden_act == "gelu",
    )
    module = with_random_weights(modules.VisionTransformer(config))
    for index in float8:
        quantise_linears(module.encoder.layers[index])
    pixel_values = torch.randn(3, 3, 24, 24) * torch.tensor([1.0, 30.0, 0.0])[:, None, None, None]
    expected = module(pixel_values)
    output = CudaVisionTransformer(module)(pixel_values)
    for found, truth in zip(output, expected, strict=True):
        # Inputs that are a rounding apart, or GELU's two forms, may be rounded apart in 8 bits.
        assert relative_error(found, truth) < 1e-2
    pixel_values[0, 0, 5, 5] = torch.nan
    spoiled = CudaVisionTransformer(module)(pixel_values)
    assert spoiled.isfinite().all(-1).all(-1).tolist() == [False, True, True]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # GELU of what is far below 0
@pytest.mark.parametrize(
    "width, activation", [(1408, ""), (6144, "gelu"), (33, "gelu"), (64, ""), (10240, "relu")]
)
def test_inputs_are_rounded_to_eight_bits_by_row(width, activation):
    """By the definition of E4M3: half a step, of 1/8 of the power of two below or of 2^-9."""
    x = torch.randn(5, width) * torch.tensor([1.0, 1e4, 1e-6, 0.0, 3.0])[:, None]
    x[4, 7], x[0, -1] = 1e4, 20
    found = Float8.of(x, activation)
    truth = x.double()
    if activation == "gelu":
        truth = torch.nn.functional.gelu(x, approximate="tanh").double()
    elif activation == "relu":
        truth = truth.relu()
    scales = truth.abs().amax(1) / 448
    assert (found.scales.double() - scales).abs().le(1e-5 * scales + 1e-30).all()
    scaled = truth / scales.clamp_min(1e-30)[:, None]
    step = 2.0 ** (scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
    assert ((found.values.double() - scaled).abs() <= 0.501 * step + 1e-3 * scaled.abs()).all()
    assert (found.values.float().abs().amax(1) == torch.tensor([448.0] * 3 + [0, 448])).all()


@pytest.mark.parametrize(
    "images, tokens, hidden_act, few_rows",
    [(1, 5, "gelu", True), (2, 70, "gelu", True), (2, 5, "relu", True), (2, 5, "gelu", False)],
)
def test_qformer_equals_the_modules(images, tokens, hidden_act, few_rows, monkeypatch):
    monkeypatch.setattr("blip2.vision.cuda._FEW_ROWS", 64 if few_rows else 0)
    config = QFormerConfig(
        hidden_size=48,
        intermediate_size=300,  # more than one split of the inputs, the last not full
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=hidden_act,
        encoder_hidden_size=40,
        num_query_tokens=5,
    )
    module = with_random_weights(modules.QFormer(config, 56))
    query_tokens = torch.randn(1, 5, 48)
    image_embeds = torch.randn(images, tokens, 40)
    expected = module.double()(
        query_tokens.double().expand(images, -1, -1), image_embeds.double(), None
    )
    output = CudaQFormer(module.float(), query_tokens)(image_embeds)
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 2e-3  # TF32


@pytest.mark.parametrize(
    "capability, shared_memory",
    [
        pytest.param(86, 99 << 10, id="8.6", marks=pytest.mark.slow),
        pytest.param(89, 99 << 10, id="8.9", marks=pytest.mark.slow),
        pytest.param(90, 227 << 10, id="9.0"),
    ],
)
def test_all_launches_compile(capability, shared_memory):
    """Of a BLIP-2 of the real widths; the interpreter sees neither types nor sizes as a GPU does."""
    launches = compiled_launches("triton_compile.py", capability)
    modules = (kernels, float8_kernels) if capability >= 89 else (kernels,)
    names = {name for module in modules for name in dir(module) if name.endswith("_kernel")}
    assert {name for name, _ in launches} == names
    assert all(needed <= shared_memory for _, needed in launches)

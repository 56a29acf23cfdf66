"""ViT-g and the Q-Former on a GPU, and their kernels, against `modules.py` in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import triton
from exact import HALF, drawing, fill_free_memory_with_nan, relative_error, settle
from models import with_random_weights

from blip2.checkpoints import QFormerConfig, VisionConfig
from blip2.gpu.kernel_launch import launch
from blip2.vision import cuda, kernels, modules
from blip2.vision.cuda import CudaQFormer, CudaVisionTransformer
from blip2.vision.cuda_picture import MOST_ROWS, PictureLinear

TF32 = 4e-4  # the error of a product in it: both factors are rounded to 11 bits
IMAGES = pytest.mark.parametrize("images", [1, 3, 8, 64])
QUERIES, TOKENS = 32, 257


def floats(device: torch.device, *shape: int) -> torch.Tensor:
    """Normally distributed, in float32: none is a float16."""
    generator = torch.Generator(device).manual_seed(len(shape))
    return torch.randn(shape, generator=generator, device=device)


@pytest.fixture
def tf32() -> Iterator[None]:
    """cuBLAS multiplies so too, as it does for the Q-Former."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def assert_close(found: torch.Tensor, truth: torch.Tensor, bound: float) -> None:
    """Each picture's error is below the bound."""
    assert found.shape == truth.shape
    for one, other in zip(found, truth, strict=True):
        assert relative_error(one, other) < bound


@pytest.fixture(scope="module")
def vit(device) -> tuple[modules.VisionTransformer, CudaVisionTransformer]:
    """ViT-g with two layers: in float64, and on the same float16 weights."""
    config = VisionConfig(num_hidden_layers=2)
    assert (config.hidden_size, config.intermediate_size) == (1408, 6144)
    module = with_random_weights(modules.VisionTransformer(config)).half().to(device)
    return copy.deepcopy(module).double(), CudaVisionTransformer(module)


@IMAGES
def test_vit_equals_the_modules(vit, device, images):
    exact, fast = vit
    pixel_values = drawing(device)(images, 3, 224, 224)
    fill_free_memory_with_nan(device)
    with torch.inference_mode():
        assert_close(fast(pixel_values), exact(pixel_values.double()), 4 * HALF)


@pytest.mark.parametrize("patches, act", [(12, "gelu"), (9, "quick_gelu")])
def test_vit_of_other_sizes(device, patches, act):
    """The demo's widths, heads of 64; and patches that fill no block of attention's."""
    config = VisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=8 * patches,
        patch_size=8,
        hidden_act=act,
    )
    module = with_random_weights(modules.VisionTransformer(config)).half().to(device)
    exact = copy.deepcopy(module).double()
    fast = CudaVisionTransformer(module)
    for images in (1, 5, 64):
        pixel_values = drawing(device, images)(images, 3, config.image_size, config.image_size)
        fill_free_memory_with_nan(device)
        with torch.inference_mode():
            assert_close(fast(pixel_values), exact(pixel_values.double()), 5 * HALF)


@pytest.mark.parametrize("rows", [1, 136, 137, 264, MOST_ROWS])
@pytest.mark.parametrize(
    "kind, channels, inputs",
    [
        ("", 4224, 1408),
        ("gelu", 6144, 1408),
        ("parts", 1408, 1408),
        ("parts", 1408, 6144),
        ("", 192, 64),  # fewer steps than are copied ahead
        ("gelu", 16960, 192),  # of more blocks than there are multiprocessors, of one group each
        ("parts", 64, 128),
    ],
)
def test_products_of_one_picture_equal_float64(device, rows, kind, channels, inputs):
    draw = drawing(device)
    weight, x, bias = draw(channels, inputs, spread=0.05), draw(rows, inputs), draw(channels)
    linear = PictureLinear(weight, None if kind == "parts" else bias, gelu=kind == "gelu")
    truth = x.double() @ weight.double().T
    fill_free_memory_with_nan(device)
    found = linear(x)
    if kind == "parts":
        assert found.dtype == torch.float32
        assert relative_error(found.double().sum(0), truth) < 1e-5
    else:
        truth += bias.double()
        truth = F.gelu(truth, approximate="tanh") if kind == "gelu" else truth
        assert found.dtype == torch.float16
        assert relative_error(found, truth) < HALF
    for _ in range(20):
        assert torch.equal(linear(x), found)


def test_gelu_of_one_picture_keeps_its_digits(device):
    """Also of large numbers, and of negative ones, of which little is left."""
    x = torch.linspace(-12, 12, 64 * 64, device=device).half().view(64, 64)
    one = torch.eye(64, device=device).half()
    found = PictureLinear(one, torch.zeros(64, device=device).half(), gelu=True)(x)
    truth = F.gelu(x.double(), approximate="tanh")
    assert ((found - truth).abs() <= 2**-11 * truth.abs() + 2**-24).all()


@pytest.mark.parametrize("images, picture", [(1, True), (2, False)])
def test_one_picture_alone_has_products_of_its_own(vit, device, images, picture, monkeypatch):
    _, fast = vit
    used = []
    multiply = PictureLinear.__call__
    monkeypatch.setattr(PictureLinear, "__call__", lambda *call: used.append(0) or multiply(*call))
    fast(drawing(device)(images, 3, 224, 224))
    assert len(used) == (8 if picture and torch.cuda.get_device_capability(device)[0] == 9 else 0)


@IMAGES
def test_vits_attention_equals_float64(vit, device, images):
    _, fast = vit
    qkv = drawing(device)(images * TOKENS + -images * TOKENS % 8, 3 * 1408, spread=1.4)
    out = torch.full((len(qkv), 1408), math.nan, device=device).half()
    fast._attend(qkv, images, out)
    query, key, value = (
        qkv[: images * TOKENS].double().view(images, TOKENS, 3, 16, 88).permute(2, 0, 3, 1, 4)
    )
    weights = (query @ key.transpose(2, 3) * 88**-0.5).softmax(-1)
    truth = (weights @ value).transpose(1, 2).flatten(2)
    assert_close(out[: images * TOKENS].view_as(truth), truth, 1.5 * HALF)
    assert out[images * TOKENS :].isnan().all()


@pytest.mark.parametrize(
    "dtype, parts", [(torch.float16, 0), (torch.float16, 3), (torch.float32, 0), (torch.float32, 3)]
)
@pytest.mark.parametrize("rows, width", [(33, 768), (257, 1408), (4097, 1408)])
def test_norm_equals_float64(device, rows, width, dtype, parts):
    """Of rows whose variance is about epsilon; of some thousands a program has several."""
    draw = drawing(device)
    norm = with_random_weights(torch.nn.LayerNorm(width, eps=1e-6)).to(device, dtype)
    norm.weight += 1
    x = draw(rows, width, spread=1e-3).to(dtype)
    shift, added = draw(width, spread=1e-3).float(), draw(parts, rows, width, spread=1e-3).float()
    fast = cuda._Norm.of(norm, shift)
    settle()
    found = fast(x, added) if parts else fast(x)
    summed = x.double() + shift.double() + added.double().sum(0)
    truth = F.layer_norm(summed, (width,), norm.weight.double(), norm.bias.double(), 1e-6)
    assert relative_error(found, truth) < (HALF if dtype == torch.float16 else 1e-6)
    kept = x.clone()
    if parts:
        assert torch.equal(fast(kept, added, keeps_sum=True), found)
        sum_error = relative_error(kept, x.double() + added.double().sum(0))
        assert sum_error < (HALF if dtype == torch.float16 else 1e-6)
    assert torch.equal(fast(x, added) if parts else fast(x), found)  # x is as it was


@pytest.fixture(scope="module")
def qformer(device) -> tuple[modules.QFormer, CudaQFormer, torch.Tensor]:
    """The Q-Former with four layers, two of which look: in float64, on a GPU, and its queries."""
    config = QFormerConfig(num_hidden_layers=4)
    assert (config.hidden_size, config.intermediate_size) == (768, 3072)
    assert (config.encoder_hidden_size, config.num_query_tokens) == (1408, QUERIES)
    module = with_random_weights(modules.QFormer(config, 2560)).to(device)
    query_tokens = floats(device, 1, QUERIES, 768)
    return copy.deepcopy(module).double(), CudaQFormer(module, query_tokens), query_tokens.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@IMAGES
@pytest.mark.usefixtures("tf32")
def test_qformer_equals_the_modules(qformer, device, images, dtype):
    exact, fast, query_tokens = qformer
    image_embeds = floats(device, images, TOKENS, 1408).to(dtype)
    fill_free_memory_with_nan(device)
    with torch.inference_mode():
        truth = exact(query_tokens.expand(images, -1, -1), image_embeds.double(), None)
        found = fast(image_embeds)
    assert found.dtype == dtype
    assert_close(found, truth, 4 * TF32)


@pytest.mark.parametrize("rows", [1, 32, 33, 64])
@pytest.mark.parametrize("channels, inputs", [(768, 768), (2304, 768), (768, 3072), (203, 1408)])
def test_products_of_few_rows_equal_float64(device, rows, channels, inputs):
    weight, x = floats(device, channels, inputs), floats(device, rows, inputs)
    linear = cuda._QFormerLinear(weight)
    fill_free_memory_with_nan(device)
    parts = linear.parts(x)
    assert len(parts) == math.ceil(inputs / 256)
    assert relative_error(parts.double().sum(0), x.double() @ weight.double().T) < TF32


@pytest.mark.parametrize("parts, gelu", [(1, False), (3, True), (12, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_equal_float64(device, parts, gelu, dtype):
    rows, width = 33, 769
    summands, bias = floats(device, parts, rows, width), floats(device, width)
    out = torch.full((rows, width), math.nan, dtype=dtype, device=device)
    launch(
        kernels.sum_kernel,
        (triton.cdiv(out.numel(), 512),),
        summands,
        bias,
        out,
        out.numel(),
        width,
        PARTS=parts,
        GELU=gelu,
        BLOCK=512,
        device=device,
    )
    truth = summands.double().sum(0) + bias.double()
    if gelu:
        truth = F.gelu(truth)
    assert relative_error(out, truth) < (HALF if dtype == torch.float16 else 1e-6)


@IMAGES
@pytest.mark.parametrize("tokens, query_parts, key_parts", [(TOKENS, 3, 1), (QUERIES, 1, 3)])
def test_attention_of_queries_equals_float64(
    qformer, device, images, tokens, query_parts, key_parts
):
    """To a picture, and to one another."""
    _, fast, _ = qformer
    query = floats(device, query_parts, images * QUERIES, 2304)
    bias = floats(device, 768)
    seen = floats(device, key_parts, images * tokens, 3 * 768).flip(0, 1)
    # What is beside them in the wider rows is not looked at.
    query[:, :, 768:] = math.nan
    seen[:, :, :768] = math.nan
    found = fast._attend(query, bias, seen[:, :, 768:], tokens)
    q = (query[:, :, :768].double().sum(0) + bias.double()).view(images, QUERIES, 12, 64)
    k, v = seen[:, :, 768:].double().sum(0).view(images, tokens, 2, 12, 64).unbind(2)
    scores = torch.einsum("iqhd,ithd->ihqt", q, k) / 8
    truth = torch.einsum("ihqt,ithd->iqhd", scores.softmax(-1), v).flatten(2)
    assert_close(found.view_as(truth), truth, 3 * TF32)


def test_pictures_are_looked_at_the_same_every_time(vit, qformer, device):
    (_, vit), (_, qformer, _) = vit, qformer
    pixel_values = drawing(device)(8, 3, 224, 224)
    looks = []
    for _ in range(3):
        fill_free_memory_with_nan(device)
        image_embeds = vit(pixel_values)
        looks.append((image_embeds, qformer(image_embeds)))
    assert looks[0][1].isfinite().all()
    for look in looks[1:]:
        assert torch.equal(look[0], looks[0][0])
        assert torch.equal(look[1], looks[0][1])

"""ViT-g in FP8 on a GPU, and its kernels, against float64 on the very values that they multiply."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from exact import HALF, drawing, fill_free_memory_with_nan, relative_error, settle
from models import with_random_weights

from blip2.artifacts.tensor_files import StoredTensor
from blip2.checkpoints import Checkpoint, QFormerConfig, VisionConfig
from blip2.float8 import quantise
from blip2.gpu.float8 import Float8, Residual, product_dtype
from blip2.images import Preprocessing
from blip2.vision import cuda_float8, modules
from blip2.vision.cuda import CudaVisionTransformer
from blip2.vision.float8 import Float8Linear, quantise_linears
from blip2.vision.torch_session import TorchSession

ACTIVATIONS = {
    "": lambda x: x,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
IMAGES = pytest.mark.parametrize("images", [1, 3, 8, 64])


@pytest.fixture(autouse=True)
def on_a_gpu_with_float8(device):
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no FP8")


def product_error(device: torch.device) -> float:
    return HALF if product_dtype(device) == torch.float16 else 8 * HALF


def assert_rounded(found: Float8, truth: torch.Tensor) -> None:
    """Each row is `truth` in E4M3, times a scale of its own that makes its largest 448."""
    largest = truth.abs().amax(1)
    assert ((found.scales * 448 - largest).abs() <= 2e-3 * largest + 1e-29).all()
    scaled = truth / found.scales.double()[:, None]
    step = 2.0 ** (scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
    off = (found.values.double() - scaled).abs()
    assert (off <= 0.5 * step + 2e-3 * scaled.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, width", [(264, 1408), (16448, 1408), (16448, 6144), (7, 576)])
def test_inputs_are_rounded_by_row(device, rows, width, activation):
    x = drawing(device)(rows, width, spread=2)
    x[3] *= 1e-3
    x[4] = 0
    x[5, 7] = 1e4
    settle()
    found = Float8.of(x, activation)
    truth = x.double()
    assert_rounded(found, ACTIVATIONS[activation](truth))
    assert (found.values[4].float() == 0).all()


@pytest.mark.parametrize("rows", [33, 257, 4097])
@pytest.mark.parametrize("adds", [None, torch.float16, torch.bfloat16], ids=str)
def test_norms_round_by_row_and_add_to_the_stream(device, rows, adds):
    draw = drawing(device)
    norm = with_random_weights(torch.nn.LayerNorm(1408, eps=1e-6)).to(device).half()
    x, shift = draw(rows, 1408), draw(1408).float()
    product = None if adds is None else draw(rows, 1408, spread=3).to(adds)
    summed = x.double() + (0 if product is None else product.double())
    residual = Residual(x.clone(), product)
    settle()
    found = cuda_float8._norm(norm, shift)(residual)
    assert residual.product is None
    assert relative_error(residual.hidden, summed) <= (HALF if adds else 0)
    weight, bias = norm.weight.double(), norm.bias.double()
    assert_rounded(found, F.layer_norm(summed + shift.double(), (1408,), weight, bias, 1e-6))


@pytest.mark.parametrize("rows", [40, 264, 2056, 16448])
@pytest.mark.parametrize(
    "inputs, channels, bias",
    [(1408, 4224, True), (1408, 4224, False), (1408, 6144, True), (6144, 1408, False)],
)
def test_products_equal_float64(device, rows, inputs, channels, bias):
    """Of channels and tokens of very different sizes."""
    draw = drawing(device)
    linear = torch.nn.Linear(inputs, channels, bias=bias).to(device).half().requires_grad_(False)
    linear.weight.data = draw(channels, inputs, spread=inputs**-0.5)
    linear.weight.data *= torch.logspace(-2, 1, channels, device=device).half()[:, None]
    linear = Float8Linear(linear)
    x = Float8.of(draw(rows, inputs) * torch.logspace(-1, 1, rows, device=device).half()[:, None])
    found = cuda_float8._product(linear, adds_bias=bias)(x)
    weight = linear.weight.double() * linear.weight_scale.double()[:, None]
    truth = (x.values.double() * x.scales.double()[:, None]) @ weight.T
    if bias:
        truth += linear.bias.double()
    # Sums within the tensor cores keep 14 bits.
    assert relative_error(found, truth) < product_error(device) + 2e-3


@pytest.fixture(scope="module")
def vit(device) -> tuple[modules.VisionTransformer, CudaVisionTransformer]:
    """ViT-g with three layers, of which the second stays in 16 bits: in float32, and fast."""
    module = with_random_weights(modules.VisionTransformer(VisionConfig(num_hidden_layers=3)))
    module = module.half().to(device)
    exact = copy.deepcopy(module).float()
    for vit in (module, exact):
        for index in (0, 2):
            quantise_linears(vit.encoder.layers[index])
    return exact, CudaVisionTransformer(module)


@IMAGES
def test_vit_equals_the_modules(vit, device, images):
    exact, fast = vit
    pixel_values = drawing(device)(images, 3, 224, 224)
    fill_free_memory_with_nan(device)
    with torch.inference_mode():
        found, truth = fast(pixel_values), exact(pixel_values.float()).double()
    assert found.dtype == torch.float16
    for one, other in zip(found, truth, strict=True):
        assert relative_error(one, other) < 1e-2


def test_pictures_are_looked_at_the_same_every_time_and_alone(vit, device):
    _, fast = vit
    pixel_values = drawing(device)(8, 3, 224, 224)
    first = fast(pixel_values)
    fill_free_memory_with_nan(device)
    assert torch.equal(fast(pixel_values), first)
    pixel_values[5] = math.nan
    spoiled = fast(pixel_values).isfinite().flatten(1).all(1).tolist()
    assert spoiled == [True] * 5 + [False] + [True] * 2


def test_weights_are_rounded_on_a_gpu_as_on_a_cpu(device):
    weight = drawing(device)(64, 1408)
    values, scales = quantise(weight)
    others, other_scales = quantise(weight.cpu())
    assert torch.equal(values.cpu().view(torch.uint8), others.view(torch.uint8))
    torch.testing.assert_close(scales.cpu(), other_scales, rtol=3e-7, atol=0)


def test_a_session_reads_them_from_files_and_replays_graphs(device, tmp_path):
    """As it does of an export, by what its sidecar says of where weights lie."""
    vision = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 3, "image_size": 96, "patch_size": 8}
    qformer = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    qformer |= {"intermediate_size": 192, "encoder_hidden_size": 192}
    config = {"vision_config": vision, "qformer_config": qformer, "num_query_tokens": 8}
    vit = with_random_weights(modules.VisionTransformer(VisionConfig(**vision)))
    quantise_linears(vit.encoder.layers[0])
    queries = QFormerConfig(**qformer, num_query_tokens=8)
    tensors = {f"vision_model.{name}": value for name, value in vit.state_dict().items()}
    tensors |= with_random_weights(modules.QFormer(queries, 64)).state_dict()
    tensors["query_tokens"] = torch.randn(1, 8, 96)
    stored, file, offset = {}, tmp_path / "weights", 0
    with file.open("wb") as opened:
        for name, value in tensors.items():
            opened.write(value.contiguous().view(torch.uint8).numpy().tobytes())
            stored[name] = StoredTensor(file, offset, value.dtype, tuple(value.shape))
            offset += value.nbytes
    checkpoint = Checkpoint(tmp_path, {"model_type": "blip-2", **config}, stored, None)
    session = TorchSession(checkpoint, Preprocessing(96, 96), torch.float16, device)
    pixel_values = torch.randn(5, 3, 96, 96)
    with torch.inference_mode():
        expected = vit(pixel_values).double()
    for _ in range(3):  # as it is, while the graph is captured, and by the graph
        found = session.vit(pixel_values).clone()
        for one, other in zip(found.cpu(), expected, strict=True):
            assert relative_error(one, other) < 2e-2
        assert session.qformer(found).isfinite().all()

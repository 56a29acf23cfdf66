"""The GPU's ViT and Q-Former, run on a CPU by Triton's interpreter, against `modules.py`."""

from __future__ import annotations

import pytest
import torch
from conftest import compiled_launches
from models import with_random_weights

pytest.importorskip("triton")

from blip2.checkpoints import QFormerConfig, VisionConfig
from blip2.vision import kernels, modules
from blip2.vision.cuda import CudaQFormer, CudaVisionTransformer

pytestmark = pytest.mark.usefixtures("gpu_double")


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


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
    "capability, shared_memory", [(86, 99 << 10), (90, 227 << 10)], ids=["8.6", "9.0"]
)
def test_all_launches_compile(capability, shared_memory):
    """Of a BLIP-2 of the real widths; the interpreter sees neither types nor sizes as a GPU does."""
    launches = compiled_launches("triton_compile.py", capability)
    assert {name for name, _ in launches} == {n for n in dir(kernels) if n.endswith("_kernel")}
    assert all(needed <= shared_memory for _, needed in launches)

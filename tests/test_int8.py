"""The ViT's dynamically quantised linear layers, as ONNX Runtime computes them."""

from __future__ import annotations

import json

import models
import numpy as np
import onnx
import pytest
import torch
from conftest import run_program

from blip2 import cpu
from blip2.engines import open_vision_session
from blip2.vision import int8
from blip2.vision.export import write_graph
from blip2.vision.int8 import quantize_linears
from blip2.vision.onnx_files import OnnxFiles
from blip2.vision.onnx_runtime import open_graph, run_graph
from blip2.vision.torch_session import TorchSession

IN, OUT = 96, 40


def run_linear(linear: torch.nn.Linear, x: torch.Tensor, tmp_path) -> torch.Tensor:
    module = torch.nn.Sequential(linear)
    quantize_linears(module)
    path = tmp_path / "linear.onnx"
    write_graph(module, {"x": torch.randn(2, *x.shape[1:])}, "y", path)
    return run_graph(open_graph(path, is_int8=True), {"x": x})


@pytest.mark.parametrize("bias", [True, False])
def test_errors_are_those_of_rounding_each_token_and_channel(tmp_path, bias):
    """Against float64, for tokens and channels of very different sizes, none and one too large."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(IN, OUT, bias=bias)
    linear.weight.data *= torch.logspace(-4, 2, OUT)[:, None]
    linear.weight.data[3] = 0
    x = torch.randn(4, 7, IN) * torch.logspace(-5, 5, 7)[:, None]
    x[2, 4] = 0
    weight, inputs = linear.weight.detach().double(), x.double()
    expected = torch.nn.functional.linear(
        inputs, weight, linear.bias.detach().double() if bias else None
    )
    y = run_linear(linear, x, tmp_path).double()

    # Half a step each: of a weight 1/254 of its channel's largest, of an input 1/254 of its token's.
    # Brought from 8 bits to 7, a weight is off by one step more at most.
    weight_error = weight.abs().amax(dim=1) / 254 * (3 if int8.saturates() else 1)
    input_error = inputs.abs().amax(dim=-1) / 254
    bound = inputs.abs().sum(dim=-1)[..., None] * weight_error
    bound += input_error[..., None] * (weight.abs().sum(dim=1) + IN * weight_error)
    assert ((y - expected).abs() <= bound + 1e-5 * expected.abs()).all()
    # The bound is for the worst case: rounding at random is far from it.
    large = expected.abs() > bound
    assert large.sum() > 100
    assert ((y - expected)[large].norm() / expected[large].norm()) < (
        0.03 if int8.saturates() else 0.015
    )


def test_a_picture_does_not_depend_on_the_others_of_its_batch(tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(IN, OUT)
    x = torch.randn(3, 7, IN).abs() * torch.tensor([1.0, 50.0, 0.01])[:, None, None]
    x[1] *= -1
    together = run_linear(linear, x, tmp_path)
    assert torch.equal(together[:1], run_linear(linear, x[:1], tmp_path))


def test_export_and_run(tiny_checkpoint, tiny_opt, tmp_path, monkeypatch):
    """The ViT in 8 bits, near transformers' own, and answers from it."""
    # Weights as large as tests usually take make every rounding grow from layer to layer.
    vision = {"initializer_range": 0.05}
    model = models.tiny_blip2(tmp_path / "checkpoint", vision=vision)
    done = run_program(
        *("onnx_export.py", "--model_dir", tmp_path / "checkpoint", "--dtype", "int8"),
        *("--image", tiny_checkpoint.picture, "--output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "onnx/visual_encoder/visual_encoder.onnx"
    weights = {tuple(w.dims): w.data_type for w in onnx.load(path).graph.initializer}
    width = model.config.vision_config.hidden_size
    assert weights[width, 3 * width] == onnx.TensorProto.INT8
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["dtype"], facts["compute_dtype"]) == ("float32", "int8")

    pixel_values = torch.randn(3, 3, 28, 28)
    # Not opened by ONNX Runtime alone, whose sums of 8 bits saturate on x86 without VNNI.
    graph = open_graph(path, is_int8=True)
    [embeds] = graph.run(None, {"input": pixel_values.numpy()})
    with torch.inference_mode():
        theirs = model.vision_model(pixel_values).last_hidden_state.numpy()
    assert np.linalg.norm(embeds - theirs) < 0.05 * np.linalg.norm(theirs)

    # In bfloat16 the weights keep their 8 bits, and inputs are not rounded to as many.
    monkeypatch.setattr(cpu, "is_fast_in_bfloat16", lambda: True)
    places = tmp_path / "onnx", tmp_path / "query_tokens.pt"
    weights = OnnxFiles.open(*places).checkpoint()
    for name, parameter in model.vision_model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            steps = parameter.data.double().abs().amax(dim=1, keepdim=True) / 127
            parameter.data = ((parameter.data / steps).round() * steps).float()
        stored = weights.tensor(f"vision_model.{name}")
        torch.testing.assert_close(stored, parameter.data, rtol=1e-6, atol=1e-8)
    with torch.inference_mode():
        rounded = model.vision_model(pixel_values).last_hidden_state
    session = open_vision_session(*places)
    assert isinstance(session, TorchSession)
    in_bfloat16 = session.vit(pixel_values)
    assert 1e-3 < (in_bfloat16 - rounded).norm() / rounded.norm() < 0.01

    pixel_values[1, 0, 5, 5] = torch.nan
    [spoiled] = graph.run(None, {"input": pixel_values.numpy()})
    assert np.isfinite(spoiled).all(axis=(1, 2)).tolist() == [True, False, True]

    asked = run_program(
        *("run.py", "--engine_dir", tmp_path / "onnx", "--opt_engine_dir", tiny_opt, "--json"),
        *("--query_tokens", tmp_path / "query_tokens.pt", "--input_dir", tmp_path / "image.pt"),
        *("--input_text", ""),
    )
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["answers"]

    built = run_program(
        *("build_vit_qformer.py", "0", "--onnx_dir", tmp_path / "onnx", "--plan_dir", tmp_path)
    )
    assert built.returncode == 2
    assert "visual_encoder.onnx is float32" in built.stderr
    assert built.stderr.endswith("python onnx_export.py --dtype float16\n")


def test_a_narrower_q_former_goes_with_any_vit(tiny_checkpoint, tmp_path):
    """What it computes in bounds its error, not what lies between the stages."""
    done = run_program(
        *("onnx_export.py", "--model_dir", tiny_checkpoint.checkpoint, "--output_dir", tmp_path),
        *("--image", tiny_checkpoint.picture, "--dtype", "int8", "--qformer_dtype", "float16"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "onnx" / "Qformer" / "Qformer.onnx").is_file()

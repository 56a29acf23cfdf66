"""The ViT with linear layers in FP8: rounding, the files, which layers are left out, who runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from conftest import run_program

from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error
from blip2.vision import modules, onnx_files
from blip2.vision.export import write_graph
from blip2.vision.float8 import Float8Linear, layer_errors
from blip2.vision.onnx_files import OnnxFiles
from blip2.vision.onnx_runtime import OnnxRuntimeSession
from blip2.vision.torch_session import TorchSession

IN, OUT = 96, 48
CPU = torch.device("cpu")
# Weights as large as tests usually take make every rounding grow from layer to layer.
VISION = {"initializer_range": 0.05}


def half_step(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What rounding x to E4M3 may cost where 448 stands for `largest`."""
    one = largest.clamp_min(1e-30) / 448
    exponent = (x.abs() / one).clamp_min(2.0**-6).log2().floor()
    return 0.5 * 2 ** (exponent - 3) * one


def run_linear(module: torch.nn.Module, x: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    path = tmp_path / "linear.onnx"
    write_graph(module, {"x": torch.randn(2, *x.shape[1:])}, "y", path, opset=23)
    [weight] = [w for w in onnx.load(path).graph.initializer if list(w.dims) == [OUT, IN]]
    assert weight.data_type == onnx.TensorProto.FLOAT8E4M3FN
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("runs", ["PyTorch", "ONNX Runtime"])
def test_errors_are_those_of_rounding_each_token_and_channel(tmp_path, runs, bias):
    """Against float64, for tokens and channels of very different sizes, none and one too large."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(IN, OUT, bias=bias)
    linear.weight.data *= torch.logspace(-4, 2, OUT)[:, None]
    linear.weight.data[3] = 0
    x = torch.randn(4, 7, IN) * torch.logspace(-5, 5, 7)[:, None]
    x[2, 4] = 0
    x[3, 5, 11] = 1e6
    weight, inputs = linear.weight.detach().double(), x.double()
    expected = inputs @ weight.T + (linear.bias.detach().double() if bias else 0)
    module = torch.nn.Sequential(Float8Linear(linear))
    y = (module(x) if runs == "PyTorch" else run_linear(module, x, tmp_path)).double()

    weight_error = half_step(weight, weight.abs().amax(1, keepdim=True))
    input_error = half_step(inputs, inputs.abs().amax(-1, keepdim=True))
    bound = inputs.abs() @ weight_error.T + input_error @ (weight.abs() + weight_error).T
    assert ((y - expected).abs() <= bound + 1e-5 * expected.abs()).all()
    # The bound is for the worst case: rounding at random is far from it.
    large = expected.abs() > bound
    assert large.sum() > 100
    assert ((y - expected)[large].norm() / expected[large].norm()) < 0.05


def test_a_picture_does_not_depend_on_the_others_of_its_batch(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(Float8Linear(torch.nn.Linear(IN, OUT)))
    x = torch.randn(3, 7, IN).abs() * torch.tensor([1.0, 50.0, 0.01])[:, None, None]
    assert torch.equal(run_linear(module, x, tmp_path)[:1], run_linear(module, x[:1], tmp_path))


def export(checkpoint: Path, output: Path, *more: str):
    return run_program(
        *("onnx_export.py", "--model_dir", checkpoint, "--output_dir", output, *more),
        *("--image", checkpoint.parent / "picture.png", "--dtype", "float8"),
    )


def wild(checkpoint: Path, *layers: int) -> None:
    """Give these layers a unit so large that in 8 bits the others vanish; no output has it."""
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for index in layers:
        mlp = f"vision_model.encoder.layers.{index}.mlp"
        tensors[f"{mlp}.fc1.weight"] *= 0.02
        tensors[f"{mlp}.fc1.bias"][:] = 0
        tensors[f"{mlp}.fc1.bias"][5] = 3e4
        tensors[f"{mlp}.fc2.weight"] *= 50
        tensors[f"{mlp}.fc2.weight"][:, 5] = 0
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def make_checkpoint(directory: Path, picture: Path, vision: dict = VISION):
    shutil.copy(picture, directory / "picture.png")
    return models.tiny_blip2(directory / "checkpoint", vision=vision)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """An export whose second layer of three stays in 16 bits, and what the program printed."""
    directory = tmp_path_factory.mktemp("float8")
    make_checkpoint(directory, tiny_checkpoint.picture)
    wild(directory / "checkpoint", 1)
    done = export(directory / "checkpoint", directory)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def open_files(directory: Path) -> OnnxFiles:
    return OnnxFiles.open(directory / "onnx", directory / "query_tokens.pt")


def test_layers_that_eight_bits_are_too_few_for_stay_in_16(exported):
    directory, printed = exported
    path = directory / "onnx/visual_encoder/visual_encoder.onnx"
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["dtype"], facts["compute_dtype"], facts["opset"]) == ("float16", "float8", 23)
    assert facts["float8"]["layers"] == [0, 2]
    assert facts["float8"]["float16_layers"] == [1]
    vit = modules.load_vision_transformer(open_checkpoint(directory / "checkpoint"), torch.float32)
    assert len(facts["float8"]["errors"]) == 3
    assert (
        facts["float8"]["errors"][1] > 0.1 > max(layer_errors(vit, torch.randn(2, 3, 28, 28))[::2])
    )
    [line] = [line for line in printed.splitlines() if line.startswith("ViT: ")]
    assert line.startswith("ViT: 2 of 3 layers in FP8")
    assert f"further: 1 ({facts['float8']['errors'][1]:.1%})" in line
    types = [w.data_type for w in onnx.load(path).graph.initializer]
    assert types.count(onnx.TensorProto.FLOAT8E4M3FN) == 8
    assert {node.domain for node in onnx.load(path).graph.node} == {""}


def test_files_compute_what_transformers_computes(exported, tmp_path):
    """ONNX Runtime on the graph, and this suite's modules on the weights that the sidecar locates."""
    directory, _ = exported
    model = models.tiny_blip2(tmp_path, vision=VISION)
    state = safetensors.torch.load_file(directory / "checkpoint" / "model.safetensors")
    model.load_state_dict(state, strict=False)
    files = open_files(directory)
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.inference_mode():
        theirs = model.vision_model(pixel_values).last_hidden_state
    graph = OnnxRuntimeSession(files)
    found = graph.vit(pixel_values).float()
    ours = TorchSession(files.checkpoint(), files.preprocessing, torch.float32, CPU)
    simulated = ours.vit(pixel_values)
    assert (found - theirs).norm() < 0.06 * theirs.norm()
    # float16 between the linears, and what it takes over a rounding's middle.
    assert (found - simulated).norm() < 0.02 * theirs.norm()
    assert (found - theirs).norm() > 0.005 * theirs.norm()  # it is in 8 bits

    pixel_values[1, 0, 5, 5] = torch.nan
    for session in (graph, ours):
        spoiled = session.vit(pixel_values)
        assert torch.isfinite(spoiled).all(-1).all(-1).tolist() == [True, False, True]


def test_weights_are_the_checkpoints_in_8_bits(exported):
    directory, _ = exported
    stored, original = open_files(directory).checkpoint(), open_checkpoint(directory / "checkpoint")
    vit = modules.load_vision_transformer(stored, torch.float16)
    kinds = [layer.is_float8 for layer in vit.encoder.layers]
    assert kinds == [True, False, True]
    for name, tensor in vit.state_dict().items():
        if name.endswith("weight_scale"):
            continue
        weight = original.tensor(f"vision_model.{name}").double()
        if tensor.dtype == torch.float8_e4m3fn:
            scales = vit.get_buffer(f"{name}_scale").double()[:, None]
            error = (tensor.double() * scales - weight).abs()
            assert (error <= 1.001 * half_step(weight, weight.abs().amax(1, keepdim=True))).all()
        else:
            torch.testing.assert_close(tensor.double(), weight, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("gpu_double")
def test_a_gpu_computes_what_the_graph_does(exported, monkeypatch):
    from blip2.gpu import float8
    from blip2.vision.cuda import CudaVisionTransformer

    monkeypatch.setattr(float8, "product_dtype", lambda _device: torch.float32)
    files = open_files(exported[0])
    pixel_values = torch.randn(2, 3, 28, 28)
    expected = OnnxRuntimeSession(files).vit(pixel_values).float()
    vit = modules.load_vision_transformer(files.checkpoint(), torch.float32)
    found = CudaVisionTransformer(vit)(pixel_values)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_spoiled_weights_are_refused(exported, tmp_path):
    directory = shutil.copytree(exported[0], tmp_path / "out")
    sidecar = directory / "onnx/visual_encoder/visual_encoder.json"
    name = "encoder.layers.2.mlp.fc2.weight"
    where = json.loads(sidecar.read_text())["weights"][name]
    with (sidecar.parent / where["file"]).open("r+b") as file:
        file.seek(where["offset"] + 7)
        file.write(b"\xff")  # E4M3's NaN
    with pytest.raises(Blip2Error, match=rf"vision_model\.{name} holds NaN"):
        modules.load_vision_transformer(open_files(directory).checkpoint(), torch.float16)


def test_a_cpu_refuses_them(exported, tiny_opt):
    directory, _ = exported
    for command in (
        ("run.py", "--engine_dir", directory, "--opt_engine_dir", tiny_opt, "--input_text", ""),
        ("build_vit_qformer.py", "0", "--onnx_dir", directory / "onnx", "--plan_dir", directory),
    ):
        done = run_program(*command)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert "visual_encoder.onnx is in FP8" in line
        assert line.endswith("export again with: python onnx_export.py --dtype float16")
    assert not (directory / "visual_encoder").exists()


@pytest.mark.parametrize("capability, runs", [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_from_ada_on_run_them(exported, capability, runs, monkeypatch):
    directory, _ = exported
    monkeypatch.setattr(onnx_files, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA RTX A6000")
    places = directory / "onnx", directory / "query_tokens.pt"
    if runs:
        session = onnx_files.open_onnx_session(*places)
        assert type(session) is TorchSession
        assert session.dtype == torch.float16
    else:
        with pytest.raises(Blip2Error, match=r"which an NVIDIA RTX A6000 has not: .* 8\.9"):
            onnx_files.open_onnx_session(*places)


@pytest.mark.parametrize(
    "vision, spoiled, more, message",
    [
        (VISION, (0, 1, 2), (), "FP8 is too coarse for every layer of this ViT: each is off by "),
        ({"initializer_range": 0.5}, (), (), "disagrees with PyTorch in float32"),
        (VISION | {"intermediate_size": 72}, (), (), "linears of 72 channels, and FP8 wants"),
        (VISION, (), ("--opset", "18"), "--dtype float8 needs --opset 23"),
    ],
    ids=["layers", "total", "widths", "opset"],
)
def test_what_fp8_is_not_for_is_refused(vision, spoiled, more, message, tiny_checkpoint, tmp_path):
    make_checkpoint(tmp_path, tiny_checkpoint.picture, vision)
    wild(tmp_path / "checkpoint", *spoiled)
    done = export(tmp_path / "checkpoint", tmp_path / "out", *more)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.*"))


def test_errors_are_measured_of_what_a_layer_adds(tiny_checkpoint, tmp_path):
    """Each by itself, behind exact ones, in the mean over tokens."""
    model = make_checkpoint(tmp_path, tiny_checkpoint.picture)
    vit = modules.load_vision_transformer(open_checkpoint(tmp_path / "checkpoint"), torch.float32)
    pixel_values = torch.randn(2, 3, 28, 28)
    found = layer_errors(vit, pixel_values)
    with torch.inference_mode():
        hidden = model.vision_model(pixel_values, output_hidden_states=True).hidden_states
    for index, layer in enumerate(vit.encoder.layers):
        assert not layer.is_float8  # they are left as they were
        rounded = modules.VisionLayer(model.config.vision_config)
        rounded.load_state_dict(layer.state_dict())
        for linear in (m for m in rounded.modules() if isinstance(m, torch.nn.Linear)):
            weight = linear.weight.data
            scales = weight.abs().amax(1, keepdim=True) / 448
            linear.weight.data = (weight / scales).to(torch.float8_e4m3fn).float() * scales
            linear.register_forward_pre_hook(round_inputs)
        with torch.inference_mode():
            off = rounded(hidden[index]) - hidden[index + 1]
        added = hidden[index + 1] - hidden[index]
        expected = (off.norm(dim=-1) / added.norm(dim=-1)).mean()
        np.testing.assert_allclose(found[index], expected, rtol=2e-3)


def round_inputs(_linear: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    scales = inputs[0].abs().amax(-1, keepdim=True) / 448
    return ((inputs[0] / scales).to(torch.float8_e4m3fn).float() * scales,)

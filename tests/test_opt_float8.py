"""OPT in FP8: what a conversion writes, who reads it, and who refuses to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import opt_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import artifacts, devices
from blip2.checkpoints import open_checkpoint
from blip2.engines import open_language_session
from blip2.errors import Blip2Error
from blip2.language.conversion import ConversionOptions, convert, target_config
from blip2.language.native import session
from blip2.language.native.checkpoint import open_tensors
from blip2.language.native.model import OPTModel
from blip2.language.native.session import NativeSession
from blip2.language.trtllm_format import FLOAT8_ALGO, OPTCheckpointConfig
from blip2.programs import convert_checkpoint

SCRIPT = "opt/convert_checkpoint.py"
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
CPU = torch.device("cpu")


def convert_to_float8(directory: Path, **options) -> dict[str, float]:
    checkpoint = open_checkpoint(directory / "hf")
    config = target_config(checkpoint, ConversionOptions(quant_algo=FLOAT8_ALGO, **options))
    return convert(checkpoint, config, directory / "opt")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A directory with an OPT of Hugging Face's and its conversion, and the conversion's errors.

    Channels of its weights are of very different sizes; one is all zeros.
    """
    directory = tmp_path_factory.mktemp("float8")
    model = opt_models.opt()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            parameter.data *= torch.logspace(-2, 0.5, len(parameter))[:, None]
    model.model.decoder.layers[0].fc1.weight.data[3] = 0
    model.save_pretrained(directory / "hf")
    return directory, convert_to_float8(directory)


def test_weights_are_e4m3_by_channel_and_the_rest_is_as_it_was(converted, tmp_path):
    """By the names and types of TensorRT-LLM's Fp8RowwiseLinear; values by the definition of E4M3."""
    directory, _ = converted
    tensors = load_file(directory / "opt" / "rank0.safetensors")
    checkpoint = open_checkpoint(directory / "hf")
    convert(checkpoint, target_config(checkpoint, ConversionOptions()), tmp_path / "half")
    halves = load_file(tmp_path / "half" / "rank0.safetensors")
    convert(
        checkpoint,
        target_config(checkpoint, ConversionOptions(dtype="float32")),
        tmp_path / "exact",
    )
    exact = load_file(tmp_path / "exact" / "rank0.safetensors")
    config = json.loads((directory / "opt" / "config.json").read_text())
    assert config["quantization"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert config["dtype"] == "float16"
    scales = {name for name in tensors if name.endswith(".per_channel_scale")}
    assert tensors.keys() - scales == halves.keys()
    assert len(scales) == len(LINEARS) * config["num_hidden_layers"]
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if name in scales:
            assert (tensor.dtype, tensor.ndim) == (torch.float32, 1)
        elif f"{module}.per_channel_scale" in scales and name.endswith(".weight"):
            assert tensor.dtype == torch.float8_e4m3fn
            weight, scale = exact[name].double(), tensors[f"{module}.per_channel_scale"].double()
            largest = weight.abs().amax(1)
            assert ((scale * 448 - largest).abs() <= 1e-6 * largest + 1e-29).all()
            scaled = weight / scale[:, None]
            step = 2.0 ** (scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
            off = (tensor.double() - scaled).abs()
            assert (off <= 0.5 * step + 1e-5 * scaled.abs()).all()
        else:
            assert torch.equal(tensor, halves[name]), name


def test_errors_are_those_of_the_weights(converted):
    """Which are within 2^-4 of any weight by the format itself, so that none is refused."""
    directory, errors = converted
    tensors = load_file(directory / "opt" / "rank0.safetensors")
    weight = open_checkpoint(directory / "hf").tensor("model.decoder.layers.1.fc2.weight").double()
    name = "transformer.layers.1.mlp.proj"
    scales = tensors[f"{name}.per_channel_scale"].double()[:, None]
    off = tensors[f"{name}.weight"].double() * scales - weight
    assert errors[f"{name}.weight"] == pytest.approx(float(off.norm() / weight.norm()), rel=1e-4)
    assert all(0.02 < error < 0.03 for error in errors.values())
    facts = artifacts.read_sidecar(directory / "opt" / "rank0.safetensors", "test")
    assert facts["float8_errors"] == errors


@pytest.mark.usefixtures("gpu_double")
@pytest.mark.parametrize("source", ["hf", "opt"])
def test_a_gpu_computes_what_transformers_computes(tmp_path, source):
    """From the conversion, and from the checkpoint itself: prompts in FP8, a step of one row behind."""
    pytest.importorskip("triton")
    from blip2.language.native.cuda import CudaModel

    exact = opt_models.opt(spread=0.1)
    exact.save_pretrained(tmp_path / "hf")
    convert_to_float8(tmp_path)
    model = CudaModel.load(open_tensors(tmp_path / source, "float8"), CPU)
    stored = load_file(tmp_path / "opt" / "rank0.safetensors")
    for index, layer in enumerate(model.weights.layers):
        for name in LINEARS:
            linear, prefix = getattr(layer, name.rpartition(".")[2]), f"transformer.layers.{index}"
            found = linear.weight.view(torch.uint8)
            wanted = stored[f"{prefix}.{name}.weight"].view(torch.uint8)
            # float16 comes first where the checkpoint itself is read.
            assert (found == wanted).double().mean() > (0.97 if source == "hf" else 0.9999)
    ids = torch.randint(3, model.config.vocab_size, (1, 21))
    cache = model.new_cache(torch.tensor([20]), 1, 4)
    table = torch.zeros(1, 0, model.config.hidden_size)
    prompt = model.prefill(ids[:, :20], torch.tensor([20]), table, cache).clone()
    step = model.step(ids[:, 20], cache)
    with torch.inference_mode():
        logits = exact(ids).logits
    for found, truth in ((prompt, logits[:, 19]), (step, logits[:, 20])):
        assert (found - truth).norm() < 0.1 * truth.norm()


def assert_refused(message: str, *arguments) -> None:
    with pytest.raises(Blip2Error, match=message) as error:
        NativeSession(*arguments)
    assert "\n" not in str(error.value)


def test_devices_without_it_are_refused(converted, monkeypatch):
    directory, _ = converted
    with pytest.raises(
        Blip2Error, match=r"opt is in FP8, which a CPU has not: .* 8\.9 on; convert"
    ):
        open_language_session(directory / "opt")
    assert_refused("hf is in FP8, .*; give another `precision`", directory / "hf", "float8")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(session, "best_device", lambda: gpu)
    monkeypatch.setattr(session, "_model_class", lambda _config, _device: OPTModel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 0))
    assert not devices.has_float8(gpu)
    assert_refused("in FP8, which an NVIDIA A100 has not", directory / "opt")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 9))
    assert_refused("has a form that the GPU's kernels do not take", directory / "opt")


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("mlp.fc.weight", torch.zeros(256, 64).half(), "mlp.fc.weight in float16, .*float8_e4m3fn"),
        (
            "mlp.fc.per_channel_scale",
            torch.ones(256).half(),
            "per_channel_scale in float16, .*float32",
        ),
        ("mlp.fc.per_channel_scale", torch.ones(255), r"shape \[255\]"),
        ("mlp.fc.per_channel_scale", None, "nothing as .*per_channel_scale"),
    ],
)
def test_files_of_other_tensors_are_refused(converted, tmp_path, name, tensor, message):
    directory, _ = converted
    tensors = load_file(directory / "opt" / "rank0.safetensors")
    tensors.pop(f"transformer.layers.0.{name}")
    if tensor is not None:
        tensors[f"transformer.layers.0.{name}"] = tensor
    save_file(tensors, tmp_path / "rank0.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "opt" / "config.json").read_bytes())
    assert_refused(message, tmp_path)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, {"tp_size": 2}, "goes with one GPU"),
        ({}, {"dtype": "float32"}, "`quantization` goes with float16"),
        ({"activation_function": "gelu"}, {}, "takes an OPT with ReLU"),
        ({"do_layer_norm_before": False}, {}, "takes an OPT with ReLU"),
        ({"ffn_dim": 96}, {}, "multiple of 64"),
    ],
)
def test_what_cannot_run_in_float8_is_not_converted(tmp_path, changes, options, message):
    opt_models.opt(**changes).save_pretrained(tmp_path / "hf")
    with pytest.raises(Blip2Error, match=message):
        convert_to_float8(tmp_path, **options)


def test_the_program_says_what_becomes_of_it(converted, tmp_path):
    """TensorRT-LLM's own OPT asserts that its LayerNorms yield one tensor, not values and scales."""
    directory, _ = converted
    command = (SCRIPT, "--model_dir", directory / "hf", "--output_dir", tmp_path / "out")
    done = opt_models.run(*command, "--quantization", "fp8")
    assert done.returncode == 0, done.stderr
    assert f"float16 OPT (with linears as {FLOAT8_ALGO})" in done.stdout
    assert re.search(r"FP8 changes the weights by 2\.\d%, the most by 2\.\d% \(transf", done.stdout)
    assert f"--opt_engine_dir {tmp_path / 'out'} " in done.stdout
    assert "TensorRT-LLM builds no engine of it" in done.stdout
    assert "trtllm-build" not in done.stdout
    config = OPTCheckpointConfig("float16", 32, 32, 2560, 50272, 2048, quant_algo=FLOAT8_ALGO)
    assert str(convert_checkpoint.default_output_dir(config)) == "opt/2.7B/trt_ckpt/fp8/1-gpu"


def test_two_precisions_are_one_too_many():
    done = opt_models.run(SCRIPT, "--quantization", "fp8", "--use_weight_only")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --quantization and --use_weight_only are two precisions")

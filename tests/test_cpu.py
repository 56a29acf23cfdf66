"""What a CPU may use and is fast in, and the linear layers that are in bfloat16 there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import opt_models
import pytest
import torch
from conftest import ROOT, run_program
from safetensors.torch import load_file, save_file
from test_native_opt import convert
from torch import nn

from blip2 import bfloat16, cpu
from blip2.artifacts.tensor_files import FiniteChecks
from blip2.checkpoints.reader import open_checkpoint
from blip2.engines import open_language_session, open_vision_session
from blip2.errors import Blip2Error
from blip2.language.native.bf16 import Bfloat16Linear
from blip2.language.native.linear import FloatLinear
from blip2.vision.modules import load_vision_transformer


@pytest.fixture
def cores(monkeypatch, tmp_path):
    """A function that counts processors, of 8, for a process in the cgroups that it is given."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def count(own: str) -> int:
        (tmp_path / "own").write_text(own)
        return cpu.cores(tmp_path, tmp_path / "own")

    return count


@pytest.mark.parametrize(
    ("limit", "count"),
    [("max 100000\n", 8), ("350000 100000\n", 3), ("5000 100000", 1), ("900000 100000", 8)],
)
def test_a_container_has_its_share_of_processors(cores, tmp_path, limit, count):
    (tmp_path / "cpu.max").write_text(limit)
    assert cores("0::/\n") == count


def test_the_smallest_quota_around_a_process_counts(cores, tmp_path):
    for directory, limit in (("a", "200000 100000"), ("a/b", "600000 100000")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "cpu.max").write_text(limit)
    assert cores("0::/a/b\n") == 2
    assert cores("0::/elsewhere\n") == 8


def test_quotas_of_cgroups_version_1(cores, tmp_path):
    directory = tmp_path / "cpu,cpuacct" / "docker"
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text("300000\n")
    (directory / "cpu.cfs_period_us").write_text("100000\n")
    own = "3:memory:/docker\n2:cpu,cpuacct:/docker\n1:name=systemd:/\n"
    assert cores(own) == 3
    (directory / "cpu.cfs_quota_us").write_text("-1\n")  # no limit
    assert cores(own) == 8


def test_a_system_without_cgroups_has_its_processors(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 20)
    assert cpu.cores(tmp_path, tmp_path / "none") == 20


def test_torch_computes_on_no_more_threads_than_processors(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for quota, before, after in ((3, 64, 3), (8, 2, 2)):
            monkeypatch.setattr(cpu, "cores", lambda quota=quota: quota)
            torch.set_num_threads(before)
            cpu.limit_threads()
            assert torch.get_num_threads() == after
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        torch.set_num_threads(6)
        monkeypatch.setattr(cpu, "cores", lambda: 3)
        cpu.limit_threads()
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(threads)


_XEON = "processor : 0\nmodel name : Some Xeon\nflags : fpu avx2 avx512f avx512_bf16 {more}\n"


@pytest.mark.parametrize(
    ("more", "allowed", "gain", "is_fast"),
    [
        ("amx_bf16 amx_tile", None, None, True),  # known, and not measured
        ("amx_bf16 amx_tile", "AVX512_CORE_AMX", None, True),
        ("amx_bf16 amx_tile", "AVX512_CORE_BF16", 0.6, False),
        ("amx_bf16 amx_tile", "AVX2", None, False),
        ("", None, 1.9, True),
        ("", None, 1.0, False),
    ],
)
def test_bfloat16_is_used_where_it_is_faster(monkeypatch, tmp_path, more, allowed, gain, is_fast):
    (tmp_path / "cpuinfo").write_text(_XEON.format(more=more))
    known = cpu.instructions(tmp_path / "cpuinfo")
    assert "avx512_bf16" in known
    assert "AVX512-BF16" in cpu.model_name(tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "instructions", lambda: known)
    monkeypatch.setattr(cpu, "_bfloat16_gain", lambda: gain)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if allowed:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert cpu.is_fast_in_bfloat16.__wrapped__() is is_fast


def test_the_instructions_of_an_unknown_system_are_none(tmp_path):
    assert cpu.instructions(tmp_path / "none") == frozenset()
    assert cpu.model_name(tmp_path / "none") == "CPU ()"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64, 65])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_bfloat16_linear_is_off_by_roundings_alone(dtype, rows, with_bias):
    """Of weight, input and output, half of 2⁻⁸ each, against float64."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(50, 96, generator=generator).to(dtype)
    bias = torch.randn(50, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(rows, 1, 96, generator=generator)
    y = Bfloat16Linear.pack(weight, bias, None)(x)
    assert y.dtype == torch.float32
    assert y.shape == (rows, 1, 50)
    assert y.is_contiguous()
    product = x.double() @ weight.double().T
    expected = product if bias is None else product + bias.double()
    bound = 2**-8 * (x.double().abs() @ weight.double().abs().T) + 2**-9 * product.abs()
    assert ((y - expected).abs() <= bound + 1e-5).all()
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T
    rounded = rounded if bias is None else rounded + bias.double()
    assert ((y - rounded).norm() / rounded.norm()) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_weights_are_rounded_as_by_a_conversion(dtype):
    """Whether they lie row by row, column by column or elsewise, and in several pieces."""
    flat = torch.cat(
        [torch.randn(bfloat16._PIECE + 3), torch.tensor([6e-8, 65504, -0.0, torch.inf])]
    )
    flat = flat.to(dtype)
    table = torch.randn(70, 40).to(dtype)
    for values in (flat, table, table.T, table[:, ::2], torch.randn(2, 3, 4).to(dtype), table[:0]):
        rounded = bfloat16.rounded(values)
        assert rounded.is_contiguous()
        assert torch.equal(rounded, values.to(torch.bfloat16))


_PACK = """
import sys, torch
from blip2 import bfloat16
for dtype in (torch.float32, torch.bfloat16):
    weight, bias = torch.randn(50, 96).to(dtype), torch.randn(50).to(dtype)
    packed = bfloat16.packed(weight)
    for rows in (1, 5, 300):
        for given in (bias, None):
            x = torch.randn(rows, 2, 96).to(dtype)
            y = bfloat16.linear(x, packed, given)
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            assert y.shape == exact.shape and y.dtype == dtype
            assert (y - exact).norm() < (1e-6 if dtype == torch.float32 else 4e-3) * exact.norm()
    print(packed.is_mkldnn)
"""


def test_a_packed_weight_is_multiplied_as_it_was():
    """In float32 wherever oneDNN is, and with all of the CPU's instructions, if it has them."""
    done = subprocess.run(
        [sys.executable, "-c", _PACK],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "ALL"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    in_float32, in_bfloat16 = done.stdout.split()
    if torch.backends.mkldnn.is_available():
        assert in_float32 == "True"
    if "amx_bf16" in cpu.instructions():
        assert in_bfloat16 == "True"


def test_a_weight_stays_as_it_is_where_it_cannot_be_packed(monkeypatch):
    weight = torch.randn(5, 4)
    for error in (AttributeError, RuntimeError):

        def fail(*_, error=error):
            raise error("none here")

        monkeypatch.setattr(bfloat16, "_reorder", fail)
        assert bfloat16.packed(weight) is weight


@pytest.mark.parametrize("where", [0, bfloat16._PIECE, -1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_while_it_is_rounded(where, value):
    """In any piece, also beside the opposite infinity; the largest numbers are no infinity."""
    values = torch.full((bfloat16._PIECE + 3, 1), 65504).half()
    assert bfloat16.rounded_and_sum(values)[1].isfinite()
    values[where] = value
    values[1] = -value
    assert not bfloat16.rounded_and_sum(values)[1].isfinite()
    assert not bfloat16.rounded_and_sum(values.T)[1].isfinite()
    checks = FiniteChecks()
    for name, tensor in (("fine", torch.ones(3).half()), ("broken", values)):
        rounded = checks.add_rounded(name, tensor)
        torch.testing.assert_close(rounded, tensor.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert checks.first_not_finite() == "broken"


@pytest.fixture(scope="module")
def float16_export(tiny_checkpoint, made_once):
    """The tiny BLIP-2's ViT in float16, its Q-Former in float32, as onnx_export.py writes them."""

    def make(directory: Path) -> None:
        done = run_program(
            *("onnx_export.py", "--model_dir", tiny_checkpoint.checkpoint),
            *("--image", tiny_checkpoint.picture, "--output_dir", directory),
        )
        assert done.returncode == 0, done.stderr

    return made_once("float16_export", make)


@pytest.fixture
def fast_in_bfloat16(monkeypatch):
    monkeypatch.setattr(cpu, "is_fast_in_bfloat16", lambda: True)


@pytest.mark.usefixtures("fast_in_bfloat16")
@pytest.mark.parametrize("source", ["checkpoint", "onnx"])
def test_stages_in_bfloat16_are_near_transformers(tiny_checkpoint, float16_export, source):
    """Both networks, from a checkpoint and from float16 files, and not in float32."""
    places = {"checkpoint": tiny_checkpoint.checkpoint, "onnx": float16_export / "onnx"}
    session = open_vision_session(places[source], float16_export / "query_tokens.pt")
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.inference_mode():
        features = tiny_checkpoint.model.get_image_features(pixel_values)
    image_embeds = session.vit(pixel_values)
    query_output = session.qformer(image_embeds)
    for ours, theirs in (
        (image_embeds, features.last_hidden_state),
        (query_output, features.pooler_output),
    ):
        assert ours.dtype == torch.float32
        off = (ours - theirs).norm() / theirs.norm()
        assert 1e-3 < off < 3e-2  # float16 would be off by less


def test_every_weight_of_a_vit_in_bfloat16_is_packed(tiny_checkpoint, monkeypatch):
    packed = {}

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        result = weight.clone()
        packed[result.data_ptr()] = result
        return result

    monkeypatch.setattr(bfloat16, "_reorder", reorder)
    checkpoint = open_checkpoint(tiny_checkpoint.checkpoint)
    vit = load_vision_transformer(checkpoint, torch.bfloat16, torch.device("cpu"))
    linears = [name for name, child in vit.named_modules() if isinstance(child, nn.Linear)]
    assert linears
    for name in linears:
        weight = vit.get_parameter(f"{name}.weight")
        assert packed.pop(weight.data_ptr()).dtype == torch.bfloat16
        stored = checkpoint.tensor(f"vision_model.{name}.weight")
        assert torch.equal(weight, stored.bfloat16())
    assert not packed


@pytest.mark.usefixtures("fast_in_bfloat16")
def test_float32_files_are_computed_in_float32(tiny_export):
    session = open_vision_session(
        tiny_export.output / "onnx", tiny_export.output / "query_tokens.pt"
    )
    pixel_values = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        theirs = tiny_export.model.vision_model(pixel_values).last_hidden_state
    torch.testing.assert_close(session.vit(pixel_values), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fast_in_bfloat16")
def test_opt_has_bfloat16_where_the_checkpoint_has_16_bits(tiny_checkpoint):
    session = open_language_session(tiny_checkpoint.checkpoint)
    session.load()
    kinds = {type(linear) for linear in vars(session._model.weights.layers[0]).values()}
    assert Bfloat16Linear in kinds
    assert isinstance(session._model.weights.head, Bfloat16Linear)


@pytest.mark.usefixtures("fast_in_bfloat16")
def test_opt_has_float32_where_the_checkpoint_has(tmp_path):
    convert(opt_models.opt(num_hidden_layers=1), tmp_path)
    session = open_language_session(tmp_path / "opt")
    session.load()
    layer = session._model.weights.layers[0]
    assert {type(layer.qkv), type(layer.fc)} == {FloatLinear}


@pytest.mark.usefixtures("fast_in_bfloat16")
@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
        "vision_model.encoder.layers.0.layer_norm1.bias",
        "qformer.encoder.layer.0.attention.attention.query.weight",
    ],
)
def test_what_is_not_finite_is_refused(tiny_checkpoint, tmp_path, name):
    """Linears' weights, which are rounded, and what stays in float32."""
    shutil.copytree(tiny_checkpoint.checkpoint, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[1] = torch.nan
    save_file({key: value.half() for key, value in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(Blip2Error, match=f"{name} holds NaN or Inf"):
        open_vision_session(tmp_path / "broken", tmp_path / "query_tokens.pt").load()


_COUNT = """
import os, sys, torch, numpy
from blip2 import onnx_sessions
from blip2.language.native.nbits import NBitsPacker
if sys.argv[1] == "ours":
    onnx_sessions.own_process()
torch.set_num_threads(6)
packer = NBitsPacker(16)
weight = torch.randn(32, 64).half()
linears = [packer.pack(weight, None, 8) for _ in range(16)]
packer.finish()
before = len(os.listdir("/proc/self/task"))
x = torch.randn(40, 64)
outputs = [linear(x) for linear in linears]
assert all(torch.equal(y, outputs[0]) for y in outputs)
import onnxruntime
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux alone lists threads so")
def test_a_programs_linears_share_one_pool_of_threads():
    """Of 8 sessions with 6 threads each; a library's user may have sessions of another kind."""
    counts = {}
    for whose in ("ours", "another's"):
        done = subprocess.run(
            [sys.executable, "-c", _COUNT, whose], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        counts[whose] = int(done.stdout)
    assert counts["another's"] - counts["ours"] == 7 * 5

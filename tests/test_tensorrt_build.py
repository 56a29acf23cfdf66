"""build_vit_qformer.py: real plans, built by TensorRT-RTX, which needs no GPU to build."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from conftest import ROOT

from blip2 import artifacts
from blip2.artifacts import stage
from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error
from blip2.programs import build_vit_qformer
from blip2.vision import export, modules, tensorrt_build, tensorrt_plans
from blip2.vision.tensorrt_build import BuildOptions, build_plans
from blip2.vision.tensorrt_plans import QFORMER, VIT, import_tensorrt, read_plan_sidecar

trt = pytest.importorskip("tensorrt_rtx", reason="plans are built with: pip install tensorrt-rtx")

# Bits of the header's target mask, as the builder sets them for each compute capability.
TARGET_BITS = {"7.5": 1, "8.0": 2, "8.6": 4, "8.9": 8, "12.0": 16, "12.1": 32}


def header(plan: Path) -> dict:
    """Size, version and targets as a TensorRT-RTX plan itself states them."""
    content = plan.read_bytes()
    magic, size, version, again, targets = struct.unpack_from("<4s12xQ4s4sI", content)
    assert magic == again == b"vtrt"
    return {
        "size": size,
        "version": ".".join(map(str, version)),
        "targets": [name for name, bit in TARGET_BITS.items() if targets & bit],
    }


def build_plan(trt, stage, *arguments):
    """One plan's facts and seconds."""
    [built] = build_plans(trt, [stage], *arguments)
    return built


def options(*compute_capabilities: str, **rest) -> BuildOptions:
    return BuildOptions(compute_capabilities=compute_capabilities or ("8.9",), **rest)


def one_line_error(match: str, *arguments, **rest) -> None:
    with pytest.raises(Blip2Error, match=match) as error:
        build_plan(trt, *arguments, **rest)
    assert "\n" not in str(error.value)


@pytest.fixture
def onnx_dir(tiny_plans, tmp_path) -> Path:
    """A copy of the exported graphs to damage."""
    shutil.copytree(tiny_plans.onnx, tmp_path / "onnx")
    return tmp_path / "onnx"


@pytest.fixture
def plan_dir(tiny_plans, tmp_path) -> Iterator[Path]:
    """Older plans, which a failed build must leave alone."""
    shutil.copytree(tiny_plans.plan, tmp_path / "plan")
    yield tmp_path / "plan"
    for old in tiny_plans.plan.rglob("*"):
        new = tmp_path / "plan" / old.relative_to(tiny_plans.plan)
        assert old.is_dir() or new.read_bytes() == old.read_bytes()
    assert not list((tmp_path / "plan").glob(".*"))


@pytest.mark.parametrize("stage", [VIT, QFORMER], ids=["vit", "qformer"])
def test_header_and_sidecar_agree(tiny_plans, stage):
    plan = tiny_plans.plan / stage.plan_file
    sidecar = json.loads(artifacts.sidecar_path(plan).read_text())
    assert header(plan) == {
        "size": sidecar["size"],
        "version": sidecar["tensorrt"]["version"],
        "targets": sidecar["gpu"]["compute_capabilities"],
    }
    assert sidecar["size"] == plan.stat().st_size
    assert sidecar["sha256"] == artifacts.sha256(plan)
    assert sidecar["tensorrt"] == {"flavour": "tensorrt_rtx", "version": trt.__version__}
    assert sidecar["gpu"] == {"compute_capabilities": ["8.9", "12.0"]}
    assert sidecar["profile"] == {"min": 1, "opt": 4, "max": 8}

    graph = tiny_plans.onnx / stage.onnx_file
    exported = json.loads(artifacts.sidecar_path(graph).read_text())
    assert sidecar["onnx"]["sha256"] == artifacts.sha256(graph)
    assert sidecar["onnx"]["data"] == exported["data"]
    for key in ("source", "inputs", "outputs", "dtype"):
        assert sidecar[key] == exported[key], key
    if stage is VIT:
        assert sidecar["preprocessing"] == exported["preprocessing"]


def test_program_ends_with_what_it_built(tiny_plans):
    lines = tiny_plans.printed.splitlines()
    assert re.fullmatch(
        r".*/visual_encoder/visual_encoder_fp16\.plan: \d+\.\d MB in \d+\.\d s,"
        r" TensorRT-RTX [\d.]+, compute capability 8\.9, 12\.0",
        lines[0],
    )
    assert "  input  input        float16 batch x 3 x 28 x 28" in lines
    assert "  input  image_atts   int64 batch x 5" in lines
    assert "  output query_output float16 batch x 4 x 64" in lines
    assert lines.count("  batch  1 to 8, tuned for 4") == 2


@pytest.mark.parametrize("targets", [("7.5",), ("12.1", "8.0"), ("8.6", "8.6")])
def test_plan_is_for_the_targets_asked_for(tiny_plans, tmp_path, targets):
    facts, _ = build_plan(trt, VIT, tiny_plans.onnx, tmp_path, options(*targets))
    assert header(facts.path)["targets"] == sorted(set(targets), key=float)
    assert facts.compute_capabilities == tuple(sorted(set(targets), key=float))


def test_without_a_gpu_the_plan_is_for_all_but_the_oldest(tiny_plans, tmp_path):
    facts, _ = build_plan(trt, VIT, tiny_plans.onnx, tmp_path, BuildOptions())
    assert header(facts.path)["targets"] == ["8.0", "8.6", "8.9", "12.0", "12.1"]


@pytest.mark.parametrize("stage", [VIT, QFORMER], ids=["vit", "qformer"])
def test_builds_are_deterministic(tiny_plans, tmp_path, stage):
    build_plan(trt, stage, tiny_plans.onnx, tmp_path, options("8.9", "12.0"))
    for file in (Path(stage.plan_file), Path(stage.plan_file).with_suffix(".json")):
        assert (tmp_path / file).read_bytes() == (tiny_plans.plan / file).read_bytes()


@pytest.mark.parametrize("stage", [VIT, QFORMER], ids=["vit", "qformer"])
def test_rtx_plans_leave_all_memory_to_the_session(tiny_plans, tmp_path, monkeypatch, stage):
    """RTX allows no other to be captured in a CUDA graph."""
    configs, run_builder = [], tensorrt_build._run_builder

    def watch(trt, builder, network, config, report):
        configs.append(config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION))
        return run_builder(trt, builder, network, config, report)

    monkeypatch.setattr(tensorrt_build, "_run_builder", watch)
    build_plan(trt, stage, tiny_plans.onnx, tmp_path, options())
    assert configs == [True]


def test_profile_and_limits(tiny_plans, tmp_path):
    wanted = options(batch_sizes=(2, 2, 5), workspace_gb=0.5)
    facts, seconds = build_plan(trt, QFORMER, tiny_plans.onnx, tmp_path, wanted)
    assert facts.profile == (2, 2, 5)
    assert seconds > 0


def test_progress_only_moves_forward(tiny_plans, tmp_path, capsys, monkeypatch):
    seen = []
    report = lambda fraction, phase: seen.append((fraction, phase))  # noqa: E731
    build_plan(trt, VIT, tiny_plans.onnx, tmp_path, options(), report)
    assert all(0 <= fraction <= 1 for fraction, _ in seen)
    assert len({phase for _, phase in seen}) > 5
    assert sum(b[0] >= a[0] for a, b in itertools.pairwise(seen)) > 0.9 * len(seen)
    assert max(fraction for fraction, _ in seen) > 0.8

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = build_vit_qformer.ProgressBar("ViT")
    for fraction, phase in seen:
        bar.show(fraction, phase)
    bar.clear()
    shown = [int(percent) for percent in re.findall(r"(\d+)%", capsys.readouterr().err)]
    assert shown == sorted(shown)
    assert len(shown) < len(seen)


# Head sizes 7 and 15, 10 embeddings, 5 queries.
ODD = {
    "vision": {
        "hidden_size": 42,
        "num_attention_heads": 6,
        "num_hidden_layers": 1,
        "image_size": 42,
    },
    "qformer": {
        "hidden_size": 30,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "encoder_hidden_size": 42,
    },
    "num_query_tokens": 5,
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("odd")
    models.tiny_blip2(directory, **ODD)
    return directory


def _build_odd(odd: Path, stage, opset: int, directory: Path) -> None:
    """Export a network of odd shapes and build its plan."""
    checkpoint = open_checkpoint(odd)
    image_embeds = torch.randn(2, 10, 42).half()
    if stage is VIT:
        module = modules.load_vision_transformer(checkpoint, torch.float16)
        inputs = [torch.randn(2, 3, 42, 42).half()]
    else:
        module = modules.load_qformer(checkpoint, torch.float32)
        inputs = [torch.randn(2, 5, 30).half(), image_embeds, torch.ones(2, 10, dtype=torch.int64)]
    graph = directory / stage.onnx_file
    example = dict(zip(stage.inputs, inputs, strict=True))
    export.write_graph(module, example, stage.output, graph, opset)
    export.write_sidecar(graph, source={"fingerprint": checkpoint.fingerprint})
    facts, _ = build_plan(trt, stage, directory, directory / "plan", options("8.0", "12.0"))
    assert header(facts.path)["targets"] == ["8.0", "12.0"]
    assert facts.sidecar["onnx"]["opset"] == opset


@pytest.mark.parametrize("opset", export.OPSETS)
def test_odd_vit(odd, tmp_path, opset):
    _build_odd(odd, VIT, opset, tmp_path)


def test_attention_without_a_fused_kernel(odd, tmp_path, monkeypatch):
    """Opset 23's Attention in float32 has none: the builder has to be told that it may split it."""
    _build_odd(odd, QFORMER, 23, tmp_path)
    monkeypatch.setattr(tensorrt_build, "_let_attention_decompose", lambda *_: None)
    match = "not supported by a dedicated kernel"
    one_line_error(match, QFORMER, tmp_path, tmp_path / "plan", options())


def _redescribe(graph: Path, source: Path) -> None:
    """Give a damaged graph a sidecar that fits it, so that only TensorRT can tell."""
    facts = json.loads(artifacts.sidecar_path(source).read_text())
    for name in ("file", "size", "sha256"):
        del facts[name]
    facts["data"] = artifacts.describe_file(graph.with_name(graph.name + ".data"))
    artifacts.write_sidecar(graph, **facts)


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda whole: whole[: len(whole) // 2], "cannot read .*: Failed to parse the ONNX model"),
        (
            lambda _: random.Random(0).randbytes(9999),
            "cannot read .*: Failed to parse the ONNX model",
        ),
        (lambda _: b"", "cannot read .*: it holds no network; make it again with"),
        (lambda _: b"<html>no such page", "cannot read .*: it holds no network; make it again"),
    ],
    ids=["truncated", "random", "empty", "html"],
)
def test_graph_that_is_no_graph(onnx_dir, plan_dir, damage, match):
    graph = onnx_dir / VIT.onnx_file
    whole = graph.read_bytes()
    graph.write_bytes(damage(whole))
    one_line_error("bytes, its description says", VIT, onnx_dir, plan_dir, options())
    _redescribe(graph, graph)
    one_line_error(match, VIT, onnx_dir, plan_dir, options())


@pytest.mark.parametrize("damage", ["missing", "truncated", "another model's", "a flipped bit"])
def test_weights_that_do_not_belong(onnx_dir, plan_dir, damage):
    graph = onnx_dir / VIT.onnx_file
    data = graph.with_name(graph.name + ".data")
    whole = data.read_bytes()
    if damage == "missing":
        data.unlink()
        one_line_error(r"onnx\.data does not exist", VIT, onnx_dir, plan_dir, options())
        return
    if damage == "truncated":
        data.write_bytes(whole[: len(whole) // 2])
        one_line_error("it is truncated", VIT, onnx_dir, plan_dir, options())
        _redescribe(graph, graph)  # and where the sidecar does not help
        one_line_error(
            "cannot read .*length out of range for file", VIT, onnx_dir, plan_dir, options()
        )
        return
    flipped = whole[:999] + bytes([whole[999] ^ 4]) + whole[1000:]
    data.write_bytes(whole[::-1] if damage == "another model's" else flipped)
    one_line_error("damaged or replaced", VIT, onnx_dir, plan_dir, options())


def test_missing_graph(tmp_path, plan_dir):
    one_line_error(r"python onnx_export\.py", VIT, tmp_path, plan_dir, options())


def test_the_other_networks_graph(onnx_dir, plan_dir):
    shutil.rmtree(onnx_dir / "visual_encoder")
    shutil.copytree(onnx_dir / "Qformer", onnx_dir / "visual_encoder")
    for file in (onnx_dir / "visual_encoder").iterdir():
        file.rename(file.with_name(file.name.replace("Qformer", "visual_encoder")))
    one_line_error("is not the ViT: it takes query_tokens", VIT, onnx_dir, plan_dir, options())


def test_float32_graph_is_refused(onnx_dir, plan_dir):
    sidecar = onnx_dir / "visual_encoder/visual_encoder.json"
    sidecar.write_text(sidecar.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    one_line_error("export again with: .* --dtype float16", VIT, onnx_dir, plan_dir, options())


def test_profile_that_tensorrt_refuses(onnx_dir, plan_dir, monkeypatch):
    def fixed_batch(builder, network, _batch_sizes):
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, *[(1, 3, 29, 28)] * 3)
        return profile

    monkeypatch.setattr(tensorrt_build, "_profile", fixed_batch)
    one_line_error("cannot build .*profile.* tensor has", VIT, onnx_dir, plan_dir, options())
    monkeypatch.setattr(
        tensorrt_build, "_profile", lambda builder, *_: builder.create_optimization_profile()
    )
    one_line_error(
        "cannot build .*missing dimensions in profile", VIT, onnx_dir, plan_dir, options()
    )


@pytest.mark.parametrize("target", ["9.0", "3.5", "0.1"])
def test_target_that_rtx_does_not_know(onnx_dir, plan_dir, target):
    match = rf"cannot build for compute capability {re.escape(target)}, only for 7\.5, 8\.0"
    one_line_error(match, VIT, onnx_dir, plan_dir, options("8.9", target))


def test_timing_cache_is_not_for_rtx(onnx_dir, plan_dir, tmp_path):
    wanted = options(timing_cache=tmp_path / "cache")
    one_line_error("--timing_cache: TensorRT-RTX", VIT, onnx_dir, plan_dir, wanted)


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")
def test_timing_cache_is_kept(tmp_path):
    """RTX's cache does nothing, but loads and saves as TensorRT's does."""
    cache = tmp_path / "kernels.cache"
    for _ in range(2):
        config = trt.Builder(tensorrt_plans.log_of(trt)).create_builder_config()
        tensorrt_build._load_timing_cache(config, cache)
        tensorrt_build._save_timing_cache(config, cache)
        assert cache.stat().st_size > 0
    refuses = types.SimpleNamespace(create_timing_cache=lambda _: None)
    with pytest.raises(Blip2Error, match=r"kernels\.cache is no timing cache"):
        tensorrt_build._load_timing_cache(refuses, cache)


def fake_tensorrt(version: str) -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__version__ = version
    return module


def test_standard_tensorrt_builds_for_the_gpu_that_is_here(onnx_dir, plan_dir):
    standard = fake_tensorrt("10.16.1.11")
    for wanted, match in (
        (options("8.9"), "only TensorRT-RTX can; leave it out, or .*pip install tensorrt-rtx"),
        (BuildOptions(), "this machine has none; .*pip install tensorrt-rtx"),
    ):
        with pytest.raises(Blip2Error, match=match):
            build_plan(standard, VIT, onnx_dir, plan_dir, wanted)


def test_which_tensorrt_is_imported(monkeypatch):
    both = (tensorrt_plans.STANDARD, tensorrt_plans.RTX)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.16.1.11"))
    assert import_tensorrt(*both).__version__ == "10.16.1.11"
    assert import_tensorrt(*both[::-1]) is trt
    for version in ("8.6.1", "10.0.1"):  # 10.0 lacks two of the calls that sessions make
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
        with pytest.raises(Blip2Error, match=r"TensorRT .* is too old, 10\.1 is the first"):
            import_tensorrt(*both)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.1.0.27"))
    assert import_tensorrt(*both).__version__ == "10.1.0.27"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert import_tensorrt(*both) is trt
    monkeypatch.setattr(trt, "__version__", "1.1.1.26")  # without stream capture
    with pytest.raises(Blip2Error, match=r"TensorRT-RTX 1\.1\.1\.26 is too old, 1\.2 is the first"):
        import_tensorrt(*both)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(Blip2Error) as error:
        import_tensorrt(*both)
    assert str(error.value) == (
        "no TensorRT nor TensorRT-RTX can be imported; install it with: pip install tensorrt or pip"
        " install tensorrt-rtx"
    )


def test_tensorrt_without_its_libraries(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(Blip2Error, match=r"\(tensorrt: libnvinfer\.so\.10: cannot open\); install"):
        import_tensorrt(tensorrt_plans.STANDARD)


def test_interrupt_stops_the_build_and_leaves_the_old_plan(tiny_plans, plan_dir):
    progress = []

    def interrupt_once(fraction: float, _phase: str) -> None:
        progress.append(fraction)
        if len(progress) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        elif len(progress) > 40:
            time.sleep(0.05)  # it builds a tiny model; let the main thread have its turn

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_plan(trt, QFORMER, tiny_plans.onnx, plan_dir, options("8.6"), interrupt_once)
    finally:
        signal.signal(signal.SIGINT, before)
    whole = []
    build_plan(
        *(trt, QFORMER, tiny_plans.onnx, plan_dir.with_name("other"), options("8.6")),
        lambda fraction, _phase: whole.append(fraction),
    )
    assert len(progress) < len(whole)  # it stopped early


def test_unwritable_output(onnx_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    one_line_error("cannot write", VIT, onnx_dir, tmp_path / "file", options())


def test_a_new_plan_replaces_the_old_with_its_sidecar(tiny_plans, tmp_path):
    shutil.copytree(tiny_plans.plan, tmp_path, dirs_exist_ok=True)
    build_plan(trt, VIT, tiny_plans.onnx, tmp_path, options("8.6", batch_sizes=(1, 1, 2)))
    facts = read_plan_sidecar(tmp_path, VIT)
    assert (facts.compute_capabilities, facts.profile) == (("8.6",), (1, 1, 2))
    assert read_plan_sidecar(tmp_path, QFORMER).compute_capabilities == ("8.9", "12.0")


def test_a_build_says_what_it_built_though_another_replaces_it(tiny_plans, tmp_path, monkeypatch):
    publish = stage._publish

    def publish_and_lose(*arguments) -> None:
        publish(*arguments)
        (tmp_path / QFORMER.plan_file).write_bytes(
            b"another build's, its description still to come"
        )

    monkeypatch.setattr(stage, "_publish", publish_and_lose)
    facts, _ = build_plan(trt, QFORMER, tiny_plans.onnx, tmp_path, options("8.9"))
    assert facts.path == tmp_path / QFORMER.plan_file
    assert facts.compute_capabilities == ("8.9",)


def test_help_imports_nothing_heavy():
    program = (
        "import runpy, sys; sys.argv = ['build_vit_qformer.py', '--help']\n"
        "try: runpy.run_path('build_vit_qformer.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'tensorrt', 'tensorrt_rtx', 'onnx', 'numpy'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert "--compute_capability" in done.stdout

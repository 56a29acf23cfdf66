"""Artifacts that many tests share, made once a run by the programs themselves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import models
import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from PIL import Image

if TYPE_CHECKING:
    from serving_runs import Server

ROOT = Path(__file__).parent.parent
GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Only `pytest -m gpu` sees a GPU: what others test, and the programs they start, run on CPUs."""
    if not _is_on_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests in gpu/ are marked so; where there is no GPU they are skipped."""
    missing = pytest.mark.skip(reason="needs an NVIDIA GPU, and: make test-gpu")
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(missing)


# Nothing is computed in bfloat16, however fast the CPU is in it, but in the tests of that.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

# Nothing is kept from one run of the tests to the next.
_CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Say once what each of those would."""
    if _is_on_gpu(config) and not torch.cuda.is_available():
        terminalreporter.write_line("these tests need an NVIDIA GPU, and torch sees none here")


def _is_on_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr == "gpu"


def run_program(
    *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts as a user would: `run_program("run.py", "--json")`.

    Or a module: `run_program("-m", "demo.evaluate")`. The `environment` is added to the tests' own.
    """
    program = start_program(*arguments, cwd=cwd, **environment)
    try:
        out, err = program.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        program.send_signal(signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


def start_program(
    *arguments: object, cwd: Path = ROOT, **environment: str
) -> forked.Program | subprocess.Popen[str]:
    """The same, running: to be sent a signal, or to run beside others."""
    script, *rest = map(str, arguments)
    command = [script if script == "-m" else str(ROOT / script), *rest]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    if forked.is_possible(environment):
        return forked.Program(command, cwd, environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def compiled_launches(script: str, capability: int) -> list[tuple[str, int]]:
    """The kernels that triton_compile.py or one like it compiles: names, shared memory in bytes."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script, str(capability)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    launches = (line.split() for line in done.stdout.splitlines())
    return [(name, int(needed)) for name, needed in launches]


def measured(*arguments: object) -> tuple[str, float, float]:
    """Run Python; return what it printed, its seconds and the most memory it held, in bytes."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return printed, time.perf_counter() - start, usage.ru_maxrss * 1024


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> MadeOnce:
    """`made_once(name, make)`: a directory that the first test process to ask for it makes, for all."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        directory, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)  # what another failed to make
                directory.mkdir()
                make(directory)
                done.touch()
        return directory

    return made


@dataclasses.dataclass(frozen=True)
class TinyExport:
    """A tiny BLIP-2, a picture, and what onnx_export.py made of them in float32."""

    model: transformers.Blip2ForConditionalGeneration
    checkpoint: Path
    picture: Path
    output: Path


@dataclasses.dataclass(frozen=True)
class TinyCheckpoint:
    """A tiny BLIP-2 and a picture to ask it about."""

    model: transformers.Blip2ForConditionalGeneration
    checkpoint: Path
    picture: Path


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once, tmp_path_factory) -> TinyCheckpoint:
    def make(directory: Path) -> None:
        models.tiny_blip2(directory / "checkpoint")
        pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / "picture.png")

    directory = made_once("tiny", make)
    model = models.tiny_blip2(tmp_path_factory.mktemp("tiny"))  # the same one: it is seeded
    return TinyCheckpoint(model, directory / "checkpoint", directory / "picture.png")


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint, made_once) -> TinyExport:
    checkpoint, picture = tiny_checkpoint.checkpoint, tiny_checkpoint.picture

    def make(directory: Path) -> None:
        done = run_program(
            *("onnx_export.py", "--model_dir", checkpoint, "--image", picture),
            *("--dtype", "float32", "--output_dir", directory),
        )
        assert done.returncode == 0, done.stderr

    return TinyExport(tiny_checkpoint.model, checkpoint, picture, made_once("export", make))


@pytest.fixture(scope="session")
def tiny_opt(tiny_export, made_once) -> Path:
    """The tiny BLIP-2's OPT as opt/convert_checkpoint.py writes it, in float32."""

    def make(directory: Path) -> None:
        done = run_program(
            *("opt/convert_checkpoint.py", "--model_dir", tiny_export.checkpoint),
            *("--dtype", "float32", "--output_dir", directory),
        )
        assert done.returncode == 0, done.stderr

    return made_once("opt", make)


@pytest.fixture(scope="session")
def demo_opt(made_once) -> Path:
    """The demo checkpoint's OPT as opt/convert_checkpoint.py writes it."""

    def make(directory: Path) -> None:
        done = run_program(
            *("opt/convert_checkpoint.py", "--model_dir", ROOT / "demo" / "checkpoint"),
            *("--output_dir", directory),
        )
        assert done.returncode == 0, done.stderr

    return made_once("demo_opt", make)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Scenes in two folders, named in the order of their seeds."""
    from batch_runs import SCENES, scene

    directory = tmp_path_factory.mktemp("photos")
    (directory / "b").mkdir()
    for number in range(SCENES):
        folder = directory / "b" if number < 5 else directory / "c" / "d"
        folder.mkdir(parents=True, exist_ok=True)
        scene(number).image.save(folder / f"{number}.{'png' if number % 2 else 'PNG'}")
    (directory / "b" / "notes.md").write_text("no picture")
    return directory


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """serve.py with the demo checkpoint, a key and narrow bounds; one for all tests of a process."""
    pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")
    import serving_runs

    found = serving_runs.start(tmp_path_factory.mktemp("server"), "--allow_image_urls")
    try:
        found.wait_ready()
        yield found
    finally:
        found.process.kill()
        found.process.wait()


@dataclasses.dataclass(frozen=True)
class TinyPlans:
    """A tiny BLIP-2 in float16, as onnx/ and as plan/ of TensorRT-RTX for two GPUs."""

    checkpoint: Path
    output: Path
    printed: str

    @property
    def onnx(self) -> Path:
        return self.output / "onnx"

    @property
    def plan(self) -> Path:
        return self.output / "plan"


@pytest.fixture(scope="session")
def tiny_plans(tiny_checkpoint, made_once) -> TinyPlans:
    pytest.importorskip("tensorrt_rtx", reason="plans are built with: pip install tensorrt-rtx")
    # The fewest layers that have all there is: exporting takes most of the time.
    few = {"vision": {"num_hidden_layers": 1}, "qformer": {"num_hidden_layers": 2}}

    def make(output: Path) -> None:
        checkpoint = output / "checkpoint"
        models.tiny_blip2(checkpoint, **few)
        exported = run_program(
            *("onnx_export.py", "--model_dir", checkpoint, "--image", tiny_checkpoint.picture),
            *("--output_dir", output),
        )
        assert exported.returncode == 0, exported.stderr
        built = run_program(
            *("build_vit_qformer.py", "all", "--onnx_dir", output / "onnx"),
            *("--plan_dir", output / "plan", "--compute_capability", "12.0", "8.9"),
        )
        assert built.returncode == 0, built.stderr
        (output / "printed.txt").write_text(built.stdout)

    output = made_once("plans", make)
    return TinyPlans(output / "checkpoint", output, (output / "printed.txt").read_text())


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    """Programs that tests call as functions are not alone: tests have sessions of their own."""
    monkeypatch.setattr("blip2.onnx_sessions.own_process", lambda: None)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; a thread pool each would only make them wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    return torch.device("cuda")


@pytest.fixture
def gpu_double(monkeypatch) -> None:
    """What is for a GPU runs on the CPU."""
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    import gpu_double

    gpu_double.install(monkeypatch)

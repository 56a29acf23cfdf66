"""What a newcomer types: without the environment, from elsewhere, and what the programs print."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_program

from blip2 import cli

PROGRAMS = [
    *("run.py --input_dir a.png", "onnx_export.py --image a.png", "opt/convert_checkpoint.py"),
    *("build_vit_qformer.py all", "demo/evaluate.py", "demo/train.py", "-m demo.train"),
    *("-m demo.draw pictures 2", "-m bench.captions", "-m bench.cpu demo", "-m bench.gpu"),
    *("-m bench.tensorrt_check", "serve.py"),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_the_packages_one_line_says_what_to_install(program, tmp_path):
    flags, *rest = program.split()
    arguments = [flags, *rest] if flags == "-m" else [str(ROOT / flags), *rest]
    done = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT) if flags == "-m" else ""},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    command = shlex.split(done.stderr.partition("install it with: ")[2])
    files = ["-r", f"{ROOT}/requirements.txt"]
    if program == "serve.py":
        files += ["-r", f"{ROOT}/requirements-serve.txt"]
    assert command == [sys.executable, "-m", "pip", "install", *files]


def test_the_page_installs_tensorrt_llm_as_its_requirements_say():
    """torch and torchvision are a pair, from one index: else importing tensorrt_llm fails."""
    lines = [
        re.findall(r"pip install (torch==.*)", (ROOT / name).read_text())
        for name in ("docs/tensorrt.md", "requirements-tensorrt.txt")
    ]
    assert (
        lines[0]
        == lines[1]
        == ["torch==2.9.1 torchvision==0.24.1 --index-url https://download.pytorch.org/whl/cu130"]
    )


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("transformers", ["transformers>=5.23,<5.24"]),
        ("PIL", ["-r", f"{ROOT}/requirements.txt"]),
        ("ray", ["ray[serve]>=2.60,<3"]),
        ("uvicorn", ["-r", f"{ROOT}/requirements.txt", "-r", f"{ROOT}/requirements-serve.txt"]),
        ("matplotlib", ["matplotlib"]),
    ],
)
def test_what_is_to_be_installed(module, arguments):
    says = cli._missing_package(ModuleNotFoundError(name=module))
    assert shlex.split(says.partition("install it with: ")[2])[4:] == arguments


@pytest.mark.parametrize("module", ["blip2.no", "demo", "torch.no", "sqlite3", ""])
def test_what_is_missing_by_mistake_keeps_its_traceback(module):
    assert cli._missing_package(ModuleNotFoundError(name=module)) is None


def test_a_benchmark_of_a_gpu_without_one_is_one_line():
    done = run_program("-m", "bench.gpu")
    assert done.returncode == 2
    assert "error: torch sees no NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_keeps_to_its_time_and_off_the_checkpoint_of_the_repository(tmp_path):
    """Without a GPU, where a step takes seconds and drawing minutes."""
    from demo import train

    sys.argv, kept = ["train"], sys.argv
    try:
        assert train.parse_arguments().output_dir == ROOT / "demo" / "out" / "checkpoint"
    finally:
        sys.argv = kept
    done = run_program(
        *("-m", "demo.train", "--minutes", 0.2, "--output_dir", tmp_path / "c"),
        *("--evaluation_scenes", 4, "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "metrics.json").is_file()
    assert "trained and saved" in done.stdout


def shell(command: str, cwd: Path) -> str:
    """What a command prints that is pasted into a shell, of a machine that calls Python `python`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


CHECKPOINT, SCENE = ROOT / "demo" / "checkpoint", ROOT / "demo" / "scene.png"
CAPTION = (
    "a small red circle, a small orange triangle, a large purple square and a large blue square"
)


def test_what_the_conversion_prints_can_be_pasted(tmp_path):
    model = shutil.copytree(CHECKPOINT, tmp_path / "my model")
    done = run_program(
        *("opt/convert_checkpoint.py", "--model_dir", model, "--output_dir", "an opt's"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    command = done.stdout.partition("Run it as it is:\n")[2].partition("\n\n")[0]
    assert f"[A] {CAPTION}" in shell(command, tmp_path)
    build = shlex.split(done.stdout.partition("  trtllm-build")[2].partition("\nand run")[0])
    assert build[build.index("--checkpoint_dir") + 1] == "an opt's"


@pytest.fixture
def clone(tmp_path) -> Path:
    """A directory that is the repository, but for what is written there."""
    for path in ROOT.iterdir():
        if path.name not in ("onnx", "plan", "trt_engine"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_what_make_demo_prints_can_be_pasted(clone):
    # What `make test` told its own: make would say that it is one of several.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        ["make", "-o", ".venv/run-installed", "demo", "OUT=my_out"],
        cwd=clone,
        capture_output=True,
        text=True,
        env={**alone, "HF_HUB_OFFLINE": "1"},
    )
    assert made.returncode == 0, made.stderr
    assert f"[A] {CAPTION}" in made.stdout
    assert "\n[A] red\n" in made.stdout
    converted = made.stdout.partition("Run it as it is:\n")[2].partition("\n\n")[0]
    assert f"[A] {CAPTION}" in shell(converted, clone)
    many = made.stdout.partition("Many pictures, drawn to try it on:\n")[2].replace(" 200", " 3")
    assert "3 pictures done, 0 of them failed" in shell(many, clone)
    assert (clone / "captions.html").is_file()


@pytest.mark.slow  # an export of its own
def test_what_errors_print_makes_what_is_missing(clone):
    """In the order in which they come."""
    ask = ("--engine_dir", "my out/onnx", "--opt_engine_dir", "my opt", "--input_dir", SCENE)
    source = f" --model_dir {CHECKPOINT}"
    for more in ("", f" --image {SCENE}"):
        done = run_program("run.py", *ask, cwd=clone)
        assert done.returncode == 2
        command = done.stderr.partition("with: ")[2].strip()
        assert ("'my opt'" if not more else "'my out'") in command
        shell(command + source + more, clone)
    done = run_program("run.py", *ask, "--input_text", "", cwd=clone)
    assert f"[A] {CAPTION}" in done.stdout


def test_pictures_to_try_on(tmp_path):
    printed = shell(f"python {ROOT}/demo/draw.py 'my photos' 2", tmp_path)
    assert sorted(os.listdir(tmp_path / "my photos")) == ["0000.png", "0001.png"]
    command = shlex.split(printed.splitlines()[-1])
    assert command[command.index("--input_dir") + 1] == "my photos"
    kept = (tmp_path / "my photos" / "0000.png").read_bytes()
    again = run_program("demo/draw.py", tmp_path / "my photos", 3)
    assert again.returncode == 2
    assert "0000.png exists; name another folder" in again.stderr
    assert (tmp_path / "my photos" / "0000.png").read_bytes() == kept

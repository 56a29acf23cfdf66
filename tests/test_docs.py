"""The pages hold: their commands run and print what is shown, their flags and links exist."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from pages import PAGES, Command, commands, fenced, shows
from PIL import Image

pytestmark = pytest.mark.xdist_group("docs")  # pages share what they run

MODEL = "Salesforce/blip2-opt-2.7b"
CONVERT = "python opt/convert_checkpoint.py"
# What cannot run here, or need not a second time. The flags of these are checked all the same.
NOT_RUN = {
    "apt-get ": "packages of the system",
    "bench.accuracy": "data sets: test_accuracy",
    "bench.real": "network, and long: test_real",
    "bench.tensorrt_check": "TensorRT-LLM",
    "build_vit_qformer.py": "TensorRT, or plans that take minutes: test_tensorrt_build",
    "facebook/": "network: test_lavis_pth",
    "--engine_dir plan": "TensorRT",
    "http://127.0.0.1": "a server: test_serve",
    "make ": "runs these tests, or what test_newcomer pastes",
    "pip install": "network",
    "--ray": "test_cluster",
    "s3://": "network: test_remote",
    "https://": "network: test_remote",
    "serve.py": "test_serve",
    "--source lavis": "LAVIS: test_lavis",
    "trtllm-build": "TensorRT-LLM: test_trtllm_build",
    "-m venv": "network, for what is installed next",
    "wget ": "network",
    "blip2_pretrained_opt2.7b.pth": "LAVIS's weights: test_lavis_pth",
    "-m pytest": "the tests themselves",
}
# Flags of other programs that pages name.
OTHERS_FLAGS = {
    *("--index-url", "--no-deps", "--allow-run-as-root", "--check"),  # pip's, mpirun's, ruff's
    *("--paged_kv_cache", "--use_paged_context_fmha", "--kv_cache_type"),  # trtllm-build's
}

PROGRAMS = [
    *("run.py", "serve.py", "onnx_export.py", "build_vit_qformer.py", "opt/convert_checkpoint.py"),
    *(f"demo/{name}.py" for name in ("draw", "evaluate", "train")),
]


def runs_here(command: Command) -> bool:
    return not any(words in command.text for words in NOT_RUN)


class Newcomer:
    """A shell in a directory that is the repository, but for what its commands write.

    Python is called `python`, and the hub's BLIP-2 is the demo's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._printed: dict[str, str] = {}

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.directory,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HF_HOME": str(self.directory / "home"),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, code: int = 0) -> str:
        """What a command prints that ends with `code`. Pages share what several of them run."""
        command = re.sub(r"\s+# .*", "", command)
        if command not in self._printed:
            process = self.start(command)
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == code, (command, printed)
            self._printed[command] = printed
        return self._printed[command]

    def kill(self, command: str) -> None:
        """Once it has written some of its output."""
        output = self.directory / re.search(r"--output (\S+)", command)[1]
        process = self.start(command)
        until = time.monotonic() + 120
        while not (output.exists() and output.stat().st_size):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> Newcomer:
    """After `make demo`, with photos; one export stands for the demo's and for the hub's model."""
    directory = tmp_path_factory.mktemp("newcomer")
    for path in ROOT.iterdir():
        if path.name not in ("demo", "opt", "onnx", "plan", "trt_engine"):
            (directory / path.name).symlink_to(path)
    for name in ("demo", "opt"):
        (directory / name).mkdir()
        for path in (ROOT / name).iterdir():
            if path.name != "out" and not (name == "opt" and path.is_dir()):
                (directory / name / path.name).symlink_to(path)
    for name in ("photo", "a", "b"):
        Image.open(ROOT / "demo" / "scene.png").save(directory / f"{name}.jpg", quality=95)
    repository = directory / "home" / "hub" / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(ROOT / "demo" / "checkpoint", repository / "snapshots" / "0")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")

    found = Newcomer(directory)
    for command in map(stand_in, ("python onnx_export.py --image photo.jpg", CONVERT)):
        found.run(command)
    out = directory / "demo" / "out"
    (out / "opt").mkdir(parents=True)
    (out / "opt" / "fp16").symlink_to(directory / "opt/2.7B/trt_ckpt/fp16/1-gpu")
    for name in (
        "onnx",
        "image.pt",
        "image.json",
        "query_tokens.pt",
        "query_tokens.json",
        "tokenizer",
    ):
        (out / name).symlink_to(directory / name)
    return found


def stand_in(command: str) -> str:
    """The command for a model and a number of pictures that are small."""
    if (
        command.partition(" #")[0].strip() == CONVERT
    ):  # which has a default for published sizes only
        return f"{CONVERT} --output_dir opt/2.7B/trt_ckpt/fp16/1-gpu"
    return command.replace("photos 200", "photos 40")


@pytest.mark.parametrize("page", [p for p in PAGES if any(map(runs_here, commands(p)))])
def test_the_commands_of_a_page(page, newcomer):
    """In their order; what they print is what is shown, but for measured numbers."""
    for command in filter(runs_here, commands(page)):
        text = stand_in(command.text)
        if command.shown == ["Killed"]:
            newcomer.kill(text)
            continue
        printed = newcomer.run(text, code="1 of them failed" in "".join(command.shown))
        assert shows(command, printed), (command, printed)


def test_the_python_of_the_front_page(newcomer):
    [code] = [content for language, content in fenced("README.md") if language == "python"]
    printed = newcomer.run(f"python - <<'END'\n{code}\nEND")
    caption, answers, streamed = printed.splitlines()
    assert caption == streamed
    assert caption.startswith("a small red circle")
    assert answers.startswith("[Answer(text='")


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@functools.cache
def defined(program: str) -> set[str]:
    """The flags of a program: as it says them, or of bench/, whose imports take long, of its source."""
    if program.startswith("bench/"):
        source = (ROOT / program).read_text()
        return set(re.findall(r'add(?:_argument)?\(\s*"(--\w+)"', source))
    return set(re.findall(r"--\w+", run_program(program, "--help").stdout))


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_of_a_page(page):
    text = re.sub(r"trtllm-build(.*\\\n)*.*", "", (ROOT / page).read_text())  # test_trtllm_build's
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    bench = [path.relative_to(ROOT).as_posix() for path in (ROOT / "bench").glob("*.py")]
    flags = set().union(*map(defined, [*PROGRAMS, *bench]))
    assert named - flags - OTHERS_FLAGS == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_of_commands_are_their_programs(page):
    of_a_module = rf"-m ((?:bench|demo)\.\w+)|({'|'.join(map(re.escape, PROGRAMS))})"
    for command in commands(page):
        if name := re.search(of_a_module, command.text):
            program = name[2] or f"{name[1].replace('.', '/')}.py"
            named = set(re.findall(r" (--\w+)", command.text[name.end() :]))
            assert named <= defined(program), command.text


@pytest.mark.parametrize("page", PAGES)
def test_the_targets_of_a_page(page):
    """Of the Makefile."""
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", [*PAGES, "demo/README.md"])
def test_the_links_of_a_page(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target

"""run.py beside TensorRT-LLM: it runs, and answers alike, with the oldest packages it may meet.

Needs .venv-oldest, made from requirements-oldest.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from trtllm_engines import DOUBLES, install_metadata, write_engine

OLDEST = ROOT / ".venv-oldest" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not OLDEST.exists(), reason="no .venv-oldest; make it from requirements-oldest.txt"
)


@pytest.fixture(scope="module")
def arguments(tiny_export) -> list[str]:
    out = tiny_export.output
    return [
        *("--engine_dir", str(out / "onnx"), "--query_tokens", str(out / "query_tokens.pt")),
        *("--input_dir", str(out / "image.pt"), "--max_output_len", "10", "--num_beams", "2"),
        *("--input_text", "Question: what is it? Answer:", "--json"),
    ]


@pytest.fixture(scope="module")
def expected(arguments, tiny_opt):
    """The answers of the environment that the tests run in."""
    done = run_program("run.py", *arguments, "--opt_engine_dir", tiny_opt)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["answers"]


def oldest(*command: object, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python of the oldest environment, with the double of TensorRT-LLM where `site` is."""
    path = os.pathsep.join(map(str, (DOUBLES, site))) if site else ""
    return subprocess.run(
        [OLDEST, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_answers(done: subprocess.CompletedProcess[str], expected) -> None:
    assert done.returncode == 0, done.stderr
    [beams], [right] = json.loads(done.stdout)["answers"], expected
    assert [beam["text"] for beam in beams] == [beam["text"] for beam in right]
    scores = [beam["score"] for beam in beams]
    assert scores == pytest.approx([beam["score"] for beam in right], rel=1e-3)


def test_the_environment_has_the_pinned_versions():
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements-oldest.txt").read_text().split()
        if "==" in line
    )
    assert {"numpy", "transformers", "tokenizers", "torch"} <= pins.keys()
    program = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    found = oldest("-c", program, *pins).stdout.split()
    assert [version.partition("+")[0] for version in found] == list(pins.values())


def test_the_native_session_answers_alike(arguments, tiny_opt, expected):
    check_answers(oldest("run.py", *arguments, "--opt_engine_dir", tiny_opt), expected)


def test_a_tensorrt_llm_engine_answers_alike(arguments, tiny_export, tmp_path, expected):
    tiny_export.model.language_model.save_pretrained(tmp_path / "truth")
    engine = write_engine(tmp_path / "engine", tmp_path / "truth")
    done = oldest(
        *("run.py", *arguments, "--opt_engine_dir", engine),
        site=install_metadata(tmp_path / "site", "1.2.1"),
    )
    check_answers(done, expected)


def test_a_checkpoint_converts_to_the_same_bytes(tiny_export, tiny_opt, tmp_path):
    done = oldest(
        *("opt/convert_checkpoint.py", "--model_dir", tiny_export.checkpoint),
        *("--dtype", "float32", "--output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    name = "rank0.safetensors"
    assert (tmp_path / name).read_bytes() == (tiny_opt / name).read_bytes()

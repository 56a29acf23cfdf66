"""The demo through the suite's own programs: right answers in every precision."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_program

# In one process: each would export for itself.
pytestmark = pytest.mark.xdist_group("demo")

CHECKPOINT = ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    done = run_program(
        *("onnx_export.py", "--model_dir", CHECKPOINT, "--image", ROOT / "demo" / "scene.png"),
        *("--output_dir", directory),
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_answers_are_right(export, tmp_path, precision):
    rounding = ["--use_weight_only", "--weight_only_precision", precision]
    done = run_program(
        *("opt/convert_checkpoint.py", "--model_dir", CHECKPOINT, "--output_dir", tmp_path),
        *([] if precision == "fp16" else rounding),
    )
    assert done.returncode == 0, done.stderr
    judged = subprocess.run(
        [
            *(sys.executable, "-m", "demo.evaluate", "--json", "--scenes", "24"),
            *("--engine_dir", export / "onnx", "--query_tokens", export / "query_tokens.pt"),
            *("--opt_engine_dir", tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert judged.returncode == 0, judged.stderr
    scores = json.loads(judged.stdout)
    (captions, pictures), (answers, questions) = scores["captions"], scores["answers"]
    assert pictures == 24
    assert questions > 100
    assert captions / pictures >= 0.9
    assert answers / questions >= 0.97


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 12e6

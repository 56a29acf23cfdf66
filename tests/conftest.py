"""Artifacts that many tests share, made once a run by the programs themselves."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).parent.parent


def run_program(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts as a user would: `run_program("run.py", "--json")`."""
    script, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@dataclasses.dataclass(frozen=True)
class TinyExport:
    """A tiny BLIP-2, a picture, and what onnx_export.py made of them in float32."""

    model: transformers.Blip2ForConditionalGeneration
    checkpoint: Path
    picture: Path
    output: Path


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory) -> TinyExport:
    directory = tmp_path_factory.mktemp("tiny")
    model = models.tiny_blip2(directory / "checkpoint")
    picture = directory / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    done = run_program(
        "onnx_export.py",
        *("--model_dir", directory / "checkpoint", "--image", picture),
        *("--dtype", "float32", "--output_dir", directory / "out"),
    )
    assert done.returncode == 0, done.stderr
    return TinyExport(model, directory / "checkpoint", picture, directory / "out")


@pytest.fixture(scope="session")
def tiny_opt(tiny_export, tmp_path_factory) -> Path:
    """The tiny BLIP-2's OPT as opt/convert_checkpoint.py writes it, in float32."""
    directory = tmp_path_factory.mktemp("opt")
    done = run_program(
        "opt/convert_checkpoint.py",
        *("--model_dir", tiny_export.checkpoint),
        *("--dtype", "float32", "--output_dir", directory),
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; a thread pool each would only make them wait for one another."""
    torch.set_num_threads(1)

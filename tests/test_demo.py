"""The demo through the suite's own programs: right answers in every precision."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program
from tokenizers import Tokenizer

from blip2.engines import Places
from blip2.language import GenerationOptions
from blip2.pipeline import open_pipeline
from blip2.vision.onnx_files import OnnxFiles
from blip2.vision.onnx_runtime import OnnxRuntimeSession
from demo import scenes
from demo.evaluate import judge

# In one process: each would export for itself.
pytestmark = pytest.mark.xdist_group("demo")

CHECKPOINT = ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Callable[[str], Path]:
    @functools.cache
    def exported(dtype: str) -> Path:
        directory = tmp_path_factory.mktemp("demo")
        done = run_program(
            *("onnx_export.py", "--model_dir", CHECKPOINT, "--image", ROOT / "demo" / "scene.png"),
            *("--dtype", dtype, "--output_dir", directory),
        )
        assert done.returncode == 0, done.stderr
        return directory

    return exported


@pytest.mark.parametrize(
    "dtype, precision", [("float16", "fp16"), ("int8", "int8"), ("float16", "int4")]
)
def test_answers_are_right(export, tmp_path, dtype, precision):
    """`dtype` is the ViT's, `precision` the OPT's."""
    exported = export(dtype)
    rounding = ["--use_weight_only", "--weight_only_precision", precision]
    done = run_program(
        *("opt/convert_checkpoint.py", "--model_dir", CHECKPOINT, "--output_dir", tmp_path),
        *([] if precision == "fp16" else rounding),
    )
    assert done.returncode == 0, done.stderr
    judged = run_program(
        *("-m", "demo.evaluate", "--json", "--scenes", 24, "--opt_engine_dir", tmp_path),
        *("--engine_dir", exported / "onnx", "--query_tokens", exported / "query_tokens.pt"),
    )
    assert judged.returncode == 0, judged.stderr
    scores = json.loads(judged.stdout)
    assert scores.keys() == {*scenes.FORMS, "captions", "answers"}
    assert scores["captions"] == [24, 24]
    for form, (right, asked) in scores.items():
        assert asked > 10, form
        assert right / asked >= 0.97, form


def test_answers_are_right_in_float8(export, monkeypatch):
    """By the graph itself on ONNX Runtime: the suite runs it on GPUs alone."""
    monkeypatch.setattr(
        "blip2.vision.onnx_files.open_onnx_session",
        lambda *places: OnnxRuntimeSession(OnnxFiles.open(*places)),
    )
    pipeline = open_pipeline(Places.of(export("float8"), CHECKPOINT))
    ids = {"end_id": pipeline.tokenizer.end_id, "pad_id": pipeline.tokenizer.pad_id}
    examples = scenes.evaluation_set(scenes.EVALUATION_SEED, 60)
    scores = judge(pipeline, examples, GenerationOptions(**ids, max_output_len=40))
    # As in float16, where all are, of 1000 scenes.
    assert scores["captions"] == (60, 60)
    right, questions = scores["answers"]
    assert right == questions > 300


def test_a_checkpoint_that_is_trained_further_is_saved_as_it_was(tmp_path):
    from demo.model import open_model, save

    model = open_model(CHECKPOINT)
    assert next(model.parameters()).dtype == torch.float32
    save(model, Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), tmp_path / "saved")
    for file in CHECKPOINT.iterdir():
        if file.name not in ("config.json", "metrics.json"):
            assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes(), file.name
    config = (tmp_path / "saved" / "config.json").read_text()
    assert re.findall(r'"dtype": "(\w+)"', config) == ["float16"]


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 12e6

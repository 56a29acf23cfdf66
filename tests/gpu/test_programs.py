"""The programs on a GPU, started as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batch_runs import CHECKPOINT, SCENES, command, read, scene, wait_for
from conftest import ROOT
from safetensors.torch import load_file, save_file

from demo import scenes

PRECISIONS = {
    "float16": (),
    "INT8": ("--use_weight_only",),
    "INT4": ("--use_weight_only", "--weight_only_precision", "int4"),
}
# Right in docs/precision.md: all. A tie may be decided otherwise on another GPU.
CAPTIONS, ANSWERS, TIES = 1000, 8999, 5


def start(*arguments: object) -> subprocess.Popen[str]:
    """Run Python with these arguments beside others."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def convert(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    return start(
        *("opt/convert_checkpoint.py", "--model_dir", checkpoint, "--output_dir", output),
        *options,
    )


@pytest.fixture(scope="module")
def opts(tmp_path_factory) -> dict[str, Path]:
    """The demo's OPT by precision."""
    directory = tmp_path_factory.mktemp("opts")
    runs = {
        directory / name: convert(CHECKPOINT, directory / name, *options)
        for name, options in PRECISIONS.items()
    }
    for run in runs.values():
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    return {path.name: path for path in runs}


def test_the_demo_answers_rightly_in_every_precision(opts):
    runs = {
        name: start(
            *("-m", "demo.evaluate", "--json", "--scenes", CAPTIONS),
            *("--engine_dir", CHECKPOINT, "--opt_engine_dir", opt),
        )
        for name, opt in opts.items()
    }
    for name, run in runs.items():
        printed, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        scores = json.loads(printed)
        (captions, pictures), (answers, questions) = scores["captions"], scores["answers"]
        assert (pictures, questions) == (CAPTIONS, ANSWERS)
        assert captions >= CAPTIONS - TIES, name
        assert answers >= ANSWERS - TIES, name


def test_each_picture_and_question_has_its_line(opts, photos, tmp_path):
    """The truth is what was drawn."""
    count = "How many objects are there?"
    run = start(
        *command(opts["float16"], tmp_path / "out.jsonl", "--input_dir", photos),
        *("--input_text", "", "--input_text", count, "--num_beams", 3),
    )
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    found = [(line["question"], line["answer"]) for line in read(tmp_path / "out.jsonl")]
    expected = []
    for number in range(SCENES):
        truth = scene(number)
        expected += [("", scenes.caption(truth)), (count, str(len(truth.objects)))]
    assert found == expected


def test_a_run_that_is_killed_goes_on(opts, photos, tmp_path):
    """kill -9 in the middle of a sampled run, where batches show: the same file, byte for byte."""
    sampling = ("--top_p", 0.9, "--temperature", 3.0, "--seed", 3, "--batch_size", 2)
    arguments = ("--input_dir", *[photos] * 20, *sampling, "--max_output_len", 24)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    undisturbed = start(*command(opts["float16"], whole, *arguments))
    killed = start(*command(opts["float16"], output, *arguments))
    assert wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= 20, 120)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    _, errors = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, errors
    expected, written = whole.read_bytes(), output.read_bytes()
    answers = [line["answer"] for line in read(whole)]
    assert len(answers) == 20 * SCENES
    assert len(set(answers)) > 10 * SCENES  # no batch draws as another does
    assert expected.startswith(written[: written.rindex(b"\n") + 1])
    assert len(written) < len(expected)
    again = start(*command(opts["float16"], output, *arguments))
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert output.read_bytes() == expected


# A tensor whose weights become as large as float16 has them, and what is said of the stage.
OVERFLOWS = {
    "ViT": (
        "vision_model.encoder.layers.0.mlp.fc2.weight",
        "the ViT yields NaN or Inf: float16 has overflowed",
    ),
    "Q-Former": (
        "language_projection.weight",
        "the Q-Former yields NaN or Inf: float16 has overflowed",
    ),
    "OPT": (
        "language_model.model.decoder.layers.0.fc1.weight",
        "the OPT yields NaN or Inf; make its checkpoint again from the original",
    ),
}


def test_overflow_names_its_stage(opts, tmp_path):
    """Of weights that are finite; nothing is answered then."""
    checkpoints = {}
    for stage, (name, _) in OVERFLOWS.items():
        checkpoints[stage] = shutil.copytree(CHECKPOINT, tmp_path / stage)
        tensors = load_file(CHECKPOINT / "model.safetensors")
        tensors[name] = tensors[name].sign() * torch.finfo(torch.float16).max
        save_file(tensors, checkpoints[stage] / "model.safetensors", {"format": "pt"})
    loud_opt = tmp_path / "loud_opt"
    _, errors = (run := convert(checkpoints["OPT"], loud_opt)).communicate(timeout=120)
    assert run.returncode == 0, errors
    runs = {
        stage: start(
            *("run.py", "--input_dir", "demo/scene.png", "--input_text", ""),
            *("--engine_dir", CHECKPOINT if stage == "OPT" else checkpoints[stage]),
            *("--opt_engine_dir", loud_opt if stage == "OPT" else opts["float16"]),
        )
        for stage in OVERFLOWS
    }
    for stage, run in runs.items():
        printed, errors = run.communicate(timeout=120)
        assert (run.returncode, printed) == (2, ""), errors
        assert errors.splitlines()[-1].startswith(f"error: {OVERFLOWS[stage][1]}")
        assert "Traceback" not in errors

"""What is exported from LAVIS, and from its .pth without it, against LAVIS itself.

Needs .venv-lavis (make test-lavis), which makes tiny models of LAVIS's own classes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, run_program

from blip2.checkpoints import open_checkpoint
from blip2.prompts import load_tokenizer
from blip2.vision.modules import load_qformer, load_vision_transformer

LAVIS = ROOT / ".venv-lavis" / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(not LAVIS.exists(), reason="no .venv-lavis; make test-lavis makes it"),
    pytest.mark.xdist_group("lavis"),  # in one process: each would make the models for itself
]
PTH_FILES = {
    "pretrain_opt2.7b": "blip2_pretrained_opt2.7b.pth",  # its ViT was frozen: eva_vit_g.pth
    "caption_coco_opt2.7b": "blip2_caption_opt2.7b.pth",
}
PROMPTS = ["", "a photo of", "Question: what is it? Answer:"]
# An export takes most of a minute: make test-lavis goes every way. test_lavis_pth has the files, too.
ROUTES = [
    pytest.param(
        (model_type, route),
        id=f"{model_type}-{route}",
        marks=() if (model_type, route) == ("pretrain_opt2.7b", "lavis") else pytest.mark.slow,
    )
    for model_type in PTH_FILES
    for route in ("lavis", "pth")
]


def tiny_lavis(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run tests/tiny_lavis.py in the environment of LAVIS, with everything it asks for in `home`."""
    return subprocess.run(
        [LAVIS, ROOT / "tests" / "tiny_lavis.py", *map(str, arguments)],
        cwd=home,
        env={**os.environ, "TORCH_HOME": str(home / "torch"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("lavis")
    done = tiny_lavis(directory, "make")
    assert done.returncode == 0, done.stderr
    return directory


@dataclasses.dataclass(frozen=True)
class Export:
    """What onnx_export.py wrote, and what LAVIS says of the same model."""

    output: Path
    truth: dict[str, Any]


@pytest.fixture(scope="module")
def exports(home, tmp_path_factory) -> Callable[[str, str], Export]:
    """Export a model by a route; each is made once, in whatever order the tests ask for them."""

    @functools.cache
    def export(model_type: str, route: str) -> Export:
        output = tmp_path_factory.mktemp("export")
        arguments = (
            *("--hf_model_location", home / "facebook" / "opt-2.7b"),
            *("--image", home / "picture.png", "--dtype", "float32", "--output_dir", output),
        )
        if route == "lavis":
            source = ("--source", "lavis", "--model_dir", model_type)
            done = tiny_lavis(home, "export", *source, *arguments)
        else:
            pth = home / "torch" / "hub" / "checkpoints" / PTH_FILES[model_type]
            done = run_program("onnx_export.py", "--model_dir", pth, *arguments)
        assert done.returncode == 0, done.stderr
        return Export(output, torch.load(home / f"{model_type}.pt", weights_only=True))

    return export


@pytest.fixture(params=ROUTES)
def export(request, exports) -> Export:
    return exports(*request.param)


@pytest.fixture(scope="module")
def opt(home, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("opt")
    done = run_program(
        "opt/convert_checkpoint.py",
        *("--model_dir", home / "facebook" / "opt-2.7b"),
        *("--dtype", "float32", "--output_dir", directory),
    )
    assert done.returncode == 0, done.stderr
    return directory


def assert_agrees(ours: np.ndarray, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


def test_files_compute_what_lavis_computes(export):
    truth, onnx = export.truth, export.output / "onnx"
    vit = onnxruntime.InferenceSession(onnx / "visual_encoder/visual_encoder.onnx")
    [image_embeds] = vit.run(None, {"input": truth["pixel_values"].numpy()})
    assert_agrees(image_embeds, truth["image_embeds"])
    qformer = onnxruntime.InferenceSession(onnx / "Qformer/Qformer.onnx")
    inputs = {
        "query_tokens": truth["query_tokens"].numpy(),
        "image_embeds": truth["image_embeds"].numpy(),
        "image_atts": np.ones(image_embeds.shape[:2], dtype=np.int64),
    }
    [query_output] = qformer.run(None, inputs)
    assert_agrees(query_output, truth["query_output"])


def test_picture_and_query_tokens_are_lavis(export):
    image = torch.load(export.output / "image.pt", weights_only=True)
    torch.testing.assert_close(image, export.truth["pixel_values"], rtol=0, atol=1e-6)
    query_tokens = torch.load(export.output / "query_tokens.pt", weights_only=True)
    assert torch.equal(query_tokens, export.truth["query_tokens"])


def test_prompts_have_lavis_ids(export):
    tokenizer = load_tokenizer(export.output / "tokenizer")
    ids = {text: tokenizer.encode(text) for text in PROMPTS}
    assert ids == export.truth["prompt_ids"]


def test_files_names_and_shapes_are_the_guides(export):
    written = {str(path.relative_to(export.output)) for path in export.output.rglob("*.*")}
    graphs = {"onnx/visual_encoder/visual_encoder.onnx", "onnx/Qformer/Qformer.onnx"}
    saved = {"image.pt", "query_tokens.pt"}
    described = {str(Path(name).with_suffix(".json")) for name in graphs | saved}
    data = {f"{name}.data" for name in graphs}
    tokenizer = {"tokenizer/tokenizer.json", "tokenizer/generation_config.json"}
    assert written == graphs | data | saved | described | tokenizer

    truth, batch = export.truth, "batch"
    tokens, width = truth["image_embeds"].shape[1:]
    queries, query_width = truth["query_tokens"].shape[1:]
    shapes = {
        "input": [batch, *truth["pixel_values"].shape[1:]],
        "output": [batch, tokens, width],
        "query_tokens": [batch, queries, query_width],
        "image_embeds": [batch, tokens, width],
        "image_atts": [batch, tokens],
        "query_output": [batch, *truth["query_output"].shape[1:]],
    }
    found = {}
    for name in graphs:
        session = onnxruntime.InferenceSession(export.output / name)
        found |= {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}
    assert found == shapes


@pytest.mark.parametrize("num_beams", [1, 3])
def test_run_gives_lavis_answers(export, home, opt, tmp_path, num_beams):
    options = export.truth["decodings"][num_beams]
    done = run_program(
        *("run.py", "--engine_dir", export.output / "onnx", "--opt_engine_dir", opt),
        *("--query_tokens", export.output / "query_tokens.pt", "--prompt_template", "{}"),
        *(word for text in PROMPTS for word in ("--input_text", text)),
        *("--input_dir", home / "picture.png", "--output", tmp_path / "answers.jsonl"),
        *("--num_beams", num_beams, "--length_penalty", options["length_penalty"]),
        *("--max_output_len", options["max_length"], "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    ours = {
        line["question"]: [beam["text"] for beam in line.get("beams", [{"text": line["answer"]}])]
        for line in lines
    }
    assert ours == {text: export.truth["answers"][num_beams, text] for text in PROMPTS}


def test_norms_have_lavis_epsilons(home):
    for model_type, file in PTH_FILES.items():
        truth = torch.load(home / f"{model_type}.pt", weights_only=True)
        checkpoint = open_checkpoint(home / "torch" / "hub" / "checkpoints" / file)
        vit = load_vision_transformer(checkpoint, torch.float32)
        qformer = load_qformer(checkpoint, torch.float32).qformer
        assert truth["epsilons"] == {
            "ln_vision": vit.post_layernorm.eps,
            "ViT": vit.encoder.layers[0].layer_norm1.eps,
            "Q-Former": qformer.layernorm.eps,
        }


def test_damaged_download_is_one_line(home, tmp_path):
    for part in ("facebook", "bert-base-uncased", "picture.png"):
        (tmp_path / part).symlink_to(home / part)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for file in (home / "torch" / "hub" / "checkpoints").iterdir():
        (cache / file.name).write_bytes(file.read_bytes()[:-100])
    done = tiny_lavis(tmp_path, "export", "--source", "lavis", "--output_dir", "out")
    assert done.returncode == 2
    assert "error: LAVIS cannot load pretrain_opt2.7b: " in done.stderr
    assert not (tmp_path / "out").exists()

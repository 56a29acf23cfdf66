"""The whole pipeline at the real size, on random weights: does it run, and in how much memory."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from conftest import measured
from PIL import Image

pytestmark = pytest.mark.slow


def test_export_convert_run(tmp_path: Path, capsys):
    checkpoint, out, picture = (tmp_path / name for name in ("checkpoint", "out", "picture.png"))
    models.full_size_blip2(checkpoint, language=True)
    Image.effect_noise((300, 200), 80).convert("RGB").save(picture)
    source = ("--model_dir", checkpoint, "--output_dir")
    outputs = {}
    for name, *arguments in (
        ("export", "onnx_export.py", *source, out, "--image", picture),
        ("convert", "opt/convert_checkpoint.py", *source, out / "opt"),
        (
            *("run", "run.py", "--engine_dir", out / "onnx", "--opt_engine_dir", out / "opt"),
            *("--query_tokens", out / "query_tokens.pt", "--input_dir", out / "image.pt"),
            *("--input_text", "", "--max_output_len", 5, "--json"),
        ),
    ):
        outputs[name], seconds, memory = measured(*arguments)
        with capsys.disabled():
            print(f"\n{name}: {seconds:.0f} s, {memory / 1e9:.1f} GB\n{outputs[name].rstrip()}")
        if name == "export":
            assert memory < 6e9
        if name == "convert":
            assert memory < 1.5e9  # little more than the embedding
    assert json.loads(outputs["run"])["answers"]

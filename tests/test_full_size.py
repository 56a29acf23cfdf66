"""The whole pipeline at the real size, on random weights: does it run, and in how much memory."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from conftest import measured, run_program
from PIL import Image

pytestmark = pytest.mark.slow
GENERATE = """
import sys, time, torch
from pathlib import Path
from blip2.engines import open_language_session
from blip2.language import GenerationOptions
start = time.perf_counter()
session = open_language_session(Path(sys.argv[1]))
print(f"loaded in {time.perf_counter() - start:.1f} s")
ids = [torch.randint(session.vocab_size, (40,))]
options = GenerationOptions(end_id=-1, pad_id=1, max_output_len=8, num_beams=5)
table = torch.zeros(1, 0, session.hidden_size)
print(session.generate(ids, table, options)[0].beams[0])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("full") / "checkpoint"
    models.full_size_blip2(directory, language=True)
    return directory


def test_export_convert_run(checkpoint: Path, tmp_path: Path, capsys):
    out, picture = (tmp_path / name for name in ("out", "picture.png"))
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


@pytest.mark.parametrize("precision, most", {"fp16": 12e9, "int8": 5e9, "int4": 3.5e9}.items())
def test_opt_on_a_cpu_fits_in_memory(checkpoint: Path, tmp_path: Path, capsys, precision, most):
    rounding = ("--use_weight_only", "--weight_only_precision", precision)
    converted = run_program(
        *("opt/convert_checkpoint.py", "--model_dir", checkpoint, "--output_dir", tmp_path),
        *(() if precision == "fp16" else rounding),
    )
    assert converted.returncode == 0, converted.stderr
    printed, seconds, memory = measured("-c", GENERATE, tmp_path)
    with capsys.disabled():
        print(f"\n{precision}: {seconds:.0f} s, {memory / 1e9:.1f} GB\n{printed.rstrip()}")
    assert printed
    assert memory < most

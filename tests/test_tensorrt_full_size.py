"""ViT-g and the Q-Former at full size, exported and built; prints what docs/tensorrt.md reports."""

from __future__ import annotations

import re
from pathlib import Path

import models
import pytest
from conftest import measured
from PIL import Image

from blip2.vision.tensorrt_plans import QFORMER, VIT, read_plan_sidecar

pytestmark = pytest.mark.slow

MOST_EXPORT_MEMORY = 6e9
LEAST_COSINE = 0.9999


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("full") / "checkpoint"
    models.full_size_blip2(directory)
    Image.effect_noise((640, 480), 80).convert("RGB").save(directory / "picture.png")
    return directory


@pytest.mark.parametrize("opset", [18, 23])
def test_export_and_build(checkpoint, tmp_path, capsys, opset):
    pytest.importorskip("tensorrt_rtx", reason="plans are built with: pip install tensorrt-rtx")
    printed, seconds, memory = measured(
        *("onnx_export.py", "--model_dir", checkpoint, "--image", checkpoint / "picture.png"),
        *("--opset", opset, "--output_dir", tmp_path),
    )
    report = [f"export, opset {opset}: {seconds:.0f} s, {memory / 1e9:.2f} GB", printed.rstrip()]
    cosines = [float(cosine) for cosine in re.findall(r"cosine ([\d.]+)", printed)]
    for network, stage in (("0", VIT), ("1", QFORMER)):
        printed, seconds, built = measured(
            *("build_vit_qformer.py", network, "--compute_capability", "8.9", "12.0"),
            *("--onnx_dir", tmp_path / "onnx", "--plan_dir", tmp_path / "plan"),
        )
        report += [f"build: {seconds:.0f} s, {built / 1e9:.2f} GB", printed.rstrip()]
        assert read_plan_sidecar(tmp_path / "plan", stage).profile == (1, 4, 8)
    with capsys.disabled():
        print("\n" + "\n".join(report))
    assert len(cosines) == 4
    assert min(cosines) >= LEAST_COSINE
    assert memory < MOST_EXPORT_MEMORY

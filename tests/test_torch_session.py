"""The ViT and Q-Former straight from a checkpoint, against transformers and through run.py."""

from __future__ import annotations

import json

import torch
from conftest import run_program

from blip2.engines import open_vision_session


def test_stages_equal_transformers(tiny_export, tmp_path):
    session = open_vision_session(tiny_export.checkpoint, tmp_path / "none.pt")
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.inference_mode():
        features = tiny_export.model.get_image_features(pixel_values)
    image_embeds = session.vit(pixel_values)
    torch.testing.assert_close(image_embeds, features.last_hidden_state, rtol=1e-4, atol=1e-4)
    query_output = session.qformer(image_embeds)
    torch.testing.assert_close(query_output, features.pooler_output, rtol=1e-4, atol=1e-4)
    assert session.num_query_tokens == query_output.shape[1]


def test_a_checkpoint_needs_no_export(tiny_export, tiny_opt, tmp_path):
    """Same answers as through the ONNX files, with no file but the checkpoint and the picture."""
    common = ("--opt_engine_dir", tiny_opt, "--input_text", "what?", "--json")
    exported = run_program(
        *("run.py", "--engine_dir", tiny_export.output / "onnx", *common),
        *("--query_tokens", tiny_export.output / "query_tokens.pt"),
        *("--input_dir", tiny_export.output / "image.pt"),
    )
    direct = run_program(
        *("run.py", "--engine_dir", tiny_export.checkpoint, *common),
        *("--input_dir", tiny_export.picture),
        cwd=tmp_path,
    )
    assert direct.returncode == 0, direct.stderr
    assert json.loads(direct.stdout)["answers"] == json.loads(exported.stdout)["answers"]

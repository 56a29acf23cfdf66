"""The ViT and Q-Former straight from a checkpoint, against transformers and through run.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import run_program
from PIL import Image

from blip2 import images
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("engine", ["checkpoint", "onnx"])
@pytest.mark.parametrize(
    "change",
    [{}, {"rescale_factor": 1, "mean": (0, 0, 0), "std": (1, 1, 1)}, {"std": (1e-6, 1, 0.3)}],
    ids=["usual", "not normalised", "too much for float16"],
)
def test_bytes_become_pixel_values_where_the_vit_begins(tiny_export, engine, dtype, change):
    """Those that `images.pixel_values` has, which the tests of pictures compare; rounded by torch."""
    output = tiny_export.output
    places = {"checkpoint": tiny_export.checkpoint, "onnx": output / "onnx"}
    session = open_vision_session(places[engine], output / "query_tokens.pt")
    session.preprocessing = images.Preprocessing(28, 28, **change)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    values = [images.pixel_values(picture, session.preprocessing) for picture in pictures]
    resized = [images.resized_pixels(picture, session.preprocessing) for picture in pictures]
    travelling = torch.from_numpy(np.stack(resized))
    assert travelling.dtype == torch.uint8
    if not change:
        session.max_batch_size = 2
        assert torch.equal(session.vit(travelling), session.vit(torch.stack(values)))
        del session._table
    session.dtype = dtype
    expected = torch.stack(values).to(dtype)
    assert torch.isinf(expected).any() == (dtype == torch.float16 and change.get("std", [1])[0] < 1)
    assert torch.equal(session.pixel_values(travelling), expected)
    assert torch.equal(session.pixel_values(travelling[0]), expected[0])
    assert torch.equal(session.pixel_values(torch.stack(values)), expected)


def test_a_checkpoint_needs_no_export(tiny_export, tiny_opt, tmp_path):
    """Same texts as through the ONNX files, with no file but the checkpoint and the picture."""
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
    [[ours]], [[theirs]] = (json.loads(done.stdout)["answers"] for done in (direct, exported))
    assert ours["text"] == theirs["text"]
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)

"""onnx_export.py: its files against transformers' own model, and what it refuses."""

from __future__ import annotations

import json

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import run_program

from blip2.checkpoints import open_checkpoint
from blip2.engines import open_vision_session
from blip2.errors import Blip2Error
from blip2.vision import export
from blip2.vision.modules import load_qformer, load_vision_transformer

SHAPES = {
    "plain": {},
    "no qkv bias, wide heads": {
        "vision": {"qkv_bias": False, "num_attention_heads": 2, "layer_norm_eps": 1e-3}
    },
    "cross-attention everywhere": {"qformer": {"cross_attention_frequency": 1}},
    "other activations": {
        "vision": {"hidden_act": "quick_gelu"},
        "qformer": {"hidden_act": "relu"},
    },
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_modules_equal_transformers(tmp_path, shape):
    model = models.tiny_blip2(tmp_path, **SHAPES[shape])
    checkpoint = open_checkpoint(tmp_path)
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.inference_mode():
        theirs = model.vision_model(pixel_values).last_hidden_state
        image_embeds = load_vision_transformer(checkpoint, torch.float32)(pixel_values)
        torch.testing.assert_close(image_embeds, theirs, rtol=1e-4, atol=1e-4)

        their_output = model.language_projection(
            model.qformer(
                query_embeds=model.query_tokens.expand(3, -1, -1), encoder_hidden_states=theirs
            ).last_hidden_state
        )
        ones = torch.ones(theirs.shape[:2], dtype=torch.int64)
        ours = load_qformer(checkpoint, torch.float32)(
            model.query_tokens.expand(3, -1, -1), image_embeds, ones
        )
        torch.testing.assert_close(ours, their_output, rtol=1e-4, atol=1e-4)


def test_qformer_hides_what_image_atts_hides(tmp_path):
    model = models.tiny_blip2(tmp_path)
    embeds, atts = torch.randn(2, 5, 48), torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    with torch.inference_mode():
        ours = load_qformer(open_checkpoint(tmp_path), torch.float32)(
            model.query_tokens.expand(2, -1, -1), embeds, atts
        )
        theirs = model.language_projection(
            model.qformer(
                query_embeds=model.query_tokens.expand(2, -1, -1),
                encoder_hidden_states=embeds,
                encoder_attention_mask=atts,
            ).last_hidden_state
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_files_have_the_guides_names(tiny_export):
    vit = onnx.load(tiny_export.output / "onnx/visual_encoder/visual_encoder.onnx")
    qformer = onnx.load(tiny_export.output / "onnx/Qformer/Qformer.onnx")
    assert [value.name for value in vit.graph.input] == ["input"]
    assert [value.name for value in vit.graph.output] == ["output"]
    inputs = {value.name: value.type.tensor_type.elem_type for value in qformer.graph.input}
    assert list(inputs) == ["query_tokens", "image_embeds", "image_atts"]
    assert inputs["image_atts"] == onnx.TensorProto.INT64
    assert [value.name for value in qformer.graph.output] == ["query_output"]
    assert any(node.op_type == "LayerNormalization" for node in vit.graph.node)


def test_files_compute_what_transformers_computes(tiny_export):
    """Straight through ONNX Runtime's own API, at batch sizes the export did not try."""
    model, output = tiny_export.model, tiny_export.output
    pixel_values = torch.randn(5, 3, 28, 28)
    vit = onnxruntime.InferenceSession(output / "onnx/visual_encoder/visual_encoder.onnx")
    image_embeds = vit.run(None, {"input": pixel_values.numpy()})[0]
    qformer = onnxruntime.InferenceSession(output / "onnx/Qformer/Qformer.onnx")
    query_tokens = torch.load(output / "query_tokens.pt", weights_only=True)
    query_output = qformer.run(
        None,
        {
            "query_tokens": query_tokens.expand(5, -1, -1).numpy(),
            "image_embeds": image_embeds,
            "image_atts": np.ones(image_embeds.shape[:2], dtype=np.int64),
        },
    )[0]
    with torch.inference_mode():
        features = model.get_image_features(pixel_values)
    np.testing.assert_allclose(image_embeds, features.last_hidden_state, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(query_output, features.pooler_output, rtol=1e-3, atol=1e-4)


def test_saved_picture_and_query_tokens(tiny_export):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    image = torch.load(tiny_export.output / "image.pt", weights_only=True)
    picture = transformers.image_utils.load_image(str(tiny_export.picture))
    theirs = BlipImageProcessorPil(size={"height": 28, "width": 28})(picture)["pixel_values"][0]
    assert np.array_equal(image[0].numpy(), np.asarray(theirs))
    query_tokens = torch.load(tiny_export.output / "query_tokens.pt", weights_only=True)
    assert torch.equal(query_tokens, tiny_export.model.query_tokens.data)


def test_session_splits_batches_and_shares_no_memory(tiny_export):
    session = open_vision_session(
        tiny_export.output / "onnx", tiny_export.output / "query_tokens.pt"
    )
    pixel_values = torch.randn(5, 3, 28, 28)
    whole = session.qformer(session.vit(pixel_values))
    session.max_batch_size = 2
    torch.testing.assert_close(session.qformer(session.vit(pixel_values)), whole)


def test_a_file_that_disagrees_is_an_error(tmp_path):
    models.tiny_blip2(tmp_path / "checkpoint")
    module = load_vision_transformer(open_checkpoint(tmp_path / "checkpoint"), torch.float32)
    case = {"input": torch.randn(2, 3, 28, 28)}
    path = tmp_path / "visual_encoder.onnx"
    export.write_graph(module, case, "output", path)
    [reference] = export.references(module, [case])
    assert export.check_graph(path, [case], [reference], 1e-4)[0].relative < 1e-4
    with pytest.raises(Blip2Error, match=r"visual_encoder\.onnx disagrees with PyTorch"):
        export.check_graph(path, [case], [reference + 0.1], 1e-4)
    with pytest.raises(Blip2Error, match="disagrees"):
        export.check_graph(path, [case], [reference * float("nan")], 1e-4)


def test_failed_export_leaves_what_was_there(tiny_export, tmp_path):
    (tmp_path / "image.pt").write_text("mine")
    done = run_program(
        "onnx_export.py",
        *("--model_dir", tiny_export.checkpoint, "--output_dir", tmp_path),
        *("--image", tmp_path / "missing.png"),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: picture ")
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"image.pt"}
    assert (tmp_path / "image.pt").read_text() == "mine"


def test_sidecars_bind_the_artifacts_to_the_checkpoint(tiny_export):
    output = tiny_export.output
    fingerprint = open_checkpoint(tiny_export.checkpoint).fingerprint
    for path in ("onnx/visual_encoder/visual_encoder", "onnx/Qformer/Qformer", "query_tokens"):
        facts = json.loads((output / f"{path}.json").read_text())
        assert facts["source"]["fingerprint"] == fingerprint


def test_session_refuses_truncated_and_foreign_files(tiny_export, tmp_path):
    import shutil

    shutil.copytree(tiny_export.output, tmp_path / "out")
    engine_dir, query_tokens = tmp_path / "out/onnx", tmp_path / "out/query_tokens.pt"
    data = engine_dir / "visual_encoder/visual_encoder.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(Blip2Error, match=r"visual_encoder\.onnx\.data has .* bytes"):
        open_vision_session(engine_dir, query_tokens)
    data.write_bytes(whole)

    sidecar = tmp_path / "out/query_tokens.json"
    facts = json.loads(sidecar.read_text())
    facts["source"]["fingerprint"] = "another"
    sidecar.write_text(json.dumps(facts))
    with pytest.raises(Blip2Error, match="come from different checkpoints"):
        open_vision_session(engine_dir, query_tokens)


def test_no_engine_names_the_command(tmp_path):
    with pytest.raises(Blip2Error, match=r"python onnx_export\.py"):
        open_vision_session(tmp_path, tmp_path / "query_tokens.pt")

"""A .pth of LAVIS, read without LAVIS: against transformers' own model, and what is refused.

transformers' BLIP-2 is a converted LAVIS one: here its tensors get LAVIS's names back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from conftest import run_program

from blip2.checkpoints import VisionConfig, lavis_checkpoint, open_checkpoint
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.vision.modules import load_qformer, load_vision_transformer

LAVIS_NAMES = {
    "language_projection": "opt_proj",
    "vision_model.post_layernorm": "ln_vision",
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "vision_model.encoder.layers": "visual_encoder.blocks",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "qformer.layernorm": "Qformer.bert.embeddings.LayerNorm",
    "qformer.encoder": "Qformer.bert.encoder",
    "attention.attention": "attention.self",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    blip2 = models.tiny_blip2(
        tmp_path_factory.mktemp("blip2"),
        vision={"hidden_size": 176, "num_attention_heads": 2, "image_size": 42},
        qformer={"hidden_size": 128, "num_attention_heads": 2},
    )
    blip2.vision_model.post_layernorm.eps = 1e-5
    for layer in blip2.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[176:352] = 0  # LAVIS has no bias of the keys
    return blip2


def lavis_state(model) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("language_model."):
            continue
        for theirs, lavis in LAVIS_NAMES.items():
            name = name.replace(theirs, lavis)
        if name.endswith("attn.qkv.bias"):
            prefix = name.removesuffix("qkv.bias")
            state[f"{prefix}q_bias"], _, state[f"{prefix}v_bias"] = tensor.chunk(3)
        else:
            state[name] = tensor
    return state


@pytest.fixture
def write(model, tmp_path) -> Callable[..., Path]:
    """Write a .pth as LAVIS does, with the ViT in it or frozen; `change` may damage its tensors."""

    def write_pth(
        frozen: bool = True,
        change: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None,
        **more: Any,
    ) -> Path:
        state = lavis_state(model)
        change(state)
        if frozen:
            vit = {name for name in state if name.startswith("visual_encoder.")}
            content = {name.removeprefix("visual_encoder."): state.pop(name) for name in vit}
            torch.save(content, tmp_path / "eva_vit_g.pth")
        torch.save({"model": state, **more}, tmp_path / "blip2.pth")
        return tmp_path / "blip2.pth"

    return write_pth


@pytest.mark.parametrize("frozen", [True, False])
def test_pth_computes_what_transformers_computes(model, write, frozen):
    checkpoint = open_checkpoint(write(frozen, optimizer={"state": {}, "param_groups": []}))
    pixel_values = torch.randn(2, 3, 42, 42)
    query_tokens = checkpoint.tensor("query_tokens").expand(2, -1, -1)
    with torch.inference_mode():
        vit = load_vision_transformer(checkpoint, torch.float32)
        image_embeds = vit(pixel_values)
        query_output = load_qformer(checkpoint, torch.float32)(query_tokens, image_embeds, None)
        theirs = model.get_image_features(pixel_values)
    torch.testing.assert_close(image_embeds, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(query_output, theirs.pooler_output, rtol=1e-4, atol=1e-4)
    assert (vit.encoder.layers[0].layer_norm1.eps, vit.post_layernorm.eps) == (1e-6, 1e-5)
    assert Preprocessing.of(checkpoint) == Preprocessing(42, 42)


def test_both_layouts_have_one_fingerprint(write):
    assert open_checkpoint(write(True)).fingerprint == open_checkpoint(write(False)).fingerprint


def test_lavis_leaves_out_the_last_of_forty_blocks(write):
    def add_blocks(state: dict[str, torch.Tensor]) -> None:
        first = {name: x for name, x in state.items() if ".blocks.0." in name}
        for index in range(3, 40):
            state |= {name.replace(".0.", f".{index}."): x for name, x in first.items()}

    checkpoint = open_checkpoint(write(change=add_blocks))
    assert VisionConfig.of(checkpoint).num_hidden_layers == 39
    assert len(load_vision_transformer(checkpoint, torch.float32).encoder.layers) == 39


def reshape(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name].flatten()

    return change


def resize(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name][..., :-1].clone()

    return change


def remove(name: str) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda state: state.pop(name)


DAMAGES = {
    "other model": (remove("opt_proj.weight"), "is no BLIP-2 with OPT of LAVIS"),
    "no query tokens": (remove("query_tokens"), "has no tensor query_tokens"),
    "no positions": (remove("visual_encoder.pos_embed"), "has no tensor visual_encoder.pos_embed"),
    "no norm": (remove("ln_vision.bias"), "has no tensor vision_model.post_layernorm.bias"),
    "no block": (remove("visual_encoder.blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight"),
    "half a bias": (remove("visual_encoder.blocks.1.attn.v_bias"), "qkv.bias has shape"),
    "flat positions": (reshape("visual_encoder.pos_embed"), "not 3 dimensions"),
    "odd width": (resize("query_tokens"), "has width 127, no multiple"),
    "wrong shape": (resize("Qformer.bert.encoder.layer.1.output_query.dense.weight"), "has shape"),
    "wrong norm": (resize("ln_vision.weight"), "vision_model.post_layernorm.weight has shape"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_wrong_names_and_shapes_are_refused(write, damage):
    change, message = DAMAGES[damage]
    pth = write(change=change)

    def load() -> None:
        checkpoint = open_checkpoint(pth)
        load_vision_transformer(checkpoint, torch.float32)
        load_qformer(checkpoint, torch.float32)

    with pytest.raises(Blip2Error, match=re.escape(message)) as error:
        load()
    assert str(pth) in str(error.value)
    assert "\n" not in str(error.value)


def test_frozen_vit_is_missing(write):
    pth = write()
    (pth.parent / "eva_vit_g.pth").unlink()
    with pytest.raises(Blip2Error, match=r"put eva_vit_g\.pth beside it, from https://"):
        open_checkpoint(pth)


def test_pictures_of_another_size_than_the_frozen_vits(write):
    config = {"model": {"image_size": 364}}
    with pytest.raises(Blip2Error, match=r"364 x 364, eva_vit_g\.pth is for 42 x 42"):
        open_checkpoint(write(config=config))
    config["model"]["image_size"] = 42
    open_checkpoint(write(config=config))


@pytest.mark.parametrize("file", ["blip2.pth", "eva_vit_g.pth"])
@pytest.mark.parametrize("content", [None, b"", b"<html>Not found</html>"], ids=str)
def test_damaged_files_are_named(write, file, content):
    pth = write()
    damaged = pth.with_name(file)
    damaged.write_bytes(damaged.read_bytes()[:-100] if content is None else content)
    with pytest.raises(Blip2Error, match=re.escape(str(damaged))) as error:
        open_checkpoint(pth)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["blip2.pth", "eva_vit_g.pth"])
def test_code_in_a_file_is_not_run(write, file, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    pth = write()
    content = torch.load(pth.with_name(file), weights_only=True)
    torch.save({**content, "more": Payload()}, pth.with_name(file))
    with pytest.raises(Blip2Error, match=re.escape(file) + ".* could run code"):
        open_checkpoint(pth)
    assert not (tmp_path / "owned").exists()


def test_absent_files_and_models_are_refused(tmp_path):
    with pytest.raises(Blip2Error, match=r"none\.pth is missing"):
        open_checkpoint(tmp_path / "none.pth")
    with pytest.raises(Blip2Error, match=r"no BLIP-2 vicuna7b .* pretrain_opt2\.7b"):
        lavis_checkpoint("vicuna7b")


def test_without_lavis_its_environment_is_named(tmp_path):
    done = run_program("onnx_export.py", "--source", "lavis", "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: LAVIS cannot be imported here")
    assert "requirements-lavis.txt" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_opt_and_its_tokenizer_are_asked_for(write, tmp_path):
    pth = write()
    done = run_program("onnx_export.py", "--model_dir", pth, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert "give --hf_model_location" in done.stderr
    done = run_program("opt/convert_checkpoint.py", "--model_dir", pth)
    assert done.returncode == 2
    assert "is of LAVIS, which leaves OPT out" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("width, opt", [(2560, "2.7b"), (4096, "6.7b")])
def test_published_opts_are_known_by_their_width(write, width, opt):
    def widen(state: dict[str, torch.Tensor]) -> None:
        state["opt_proj.weight"] = torch.zeros(width, 128)

    assert open_checkpoint(write(change=widen)).opt_location == f"facebook/opt-{opt}"

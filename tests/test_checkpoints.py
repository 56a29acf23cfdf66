"""Checkpoints in every container read the same, and damaged ones are refused in one line."""

import json
import re
import shutil
from pathlib import Path

import opt_models
import pytest
import torch
from safetensors.torch import save_file, save_model

from blip2.checkpoints import (
    OPTConfig,
    QFormerConfig,
    VisionConfig,
    image_token_index,
    open_checkpoint,
)
from blip2.errors import Blip2Error


@pytest.fixture(scope="module")
def model():
    return opt_models.blip2()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("blip2")
    model.save_pretrained(path)
    return path


@pytest.fixture
def copy(directory, tmp_path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(directory, tmp_path / "copy")


@pytest.mark.parametrize("container", ["one file", "shards", "pickle", "sharded pickles"])
def test_every_container_gives_the_same_tensors_and_fingerprint(
    model, directory, tmp_path, container
):
    if container == "one file":
        model.save_pretrained(tmp_path)
    elif container == "shards":
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        opt_models.save_pickles(model, tmp_path, shards=3 if "sharded" in container else 1)
    checkpoint = open_checkpoint(tmp_path)
    tied = {"language_model.lm_head.weight"}
    assert set(checkpoint.names) | tied == set(model.state_dict()) | tied
    for name in checkpoint.names:
        expected = model.state_dict()[name]
        assert torch.equal(checkpoint.tensor(name), expected)
        assert checkpoint.shape(name) == expected.shape
        assert checkpoint.dtype(name) == expected.dtype
        assert name in checkpoint
    assert "absent" not in checkpoint
    assert checkpoint.kind == "blip-2"
    assert checkpoint.fingerprint == open_checkpoint(directory).fingerprint


def test_a_tied_head_counts_once_under_either_name(model, directory, tmp_path):
    """safetensors' save_model stores the head and leaves out the embedding."""
    model.config.save_pretrained(tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    assert "language_model.model.decoder.embed_tokens.weight" not in open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path).fingerprint == open_checkpoint(directory).fingerprint


def test_fingerprint_tells_weights_apart(model, directory, tmp_path):
    names = [
        "query_tokens",
        "language_model.model.decoder.layers.1.fc2.bias",
        "language_model.lm_head.weight",
    ]
    prints = {open_checkpoint(directory).fingerprint}
    for name in names:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name].view(-1)[0] += 1e-3
        model.save_pretrained(tmp_path / name, state_dict=state)
        prints.add(open_checkpoint(tmp_path / name).fingerprint)
    half = {key: value.half() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "half", state_dict=half)
    prints.add(open_checkpoint(tmp_path / "half").fingerprint)
    assert len(prints) == 5


def test_fingerprint_tells_large_weights_apart(tmp_path):
    """As two merged adapters differ: in large weights only, if in all of their rows."""
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')

    def fingerprint(**tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        whole = open_checkpoint(tmp_path).fingerprint
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        assert open_checkpoint(tmp_path).fingerprint == whole
        (tmp_path / "pytorch_model.bin").unlink()
        return whole

    torch.manual_seed(0)
    weight, positions = torch.randn(3000, 200), torch.randn(1, 700, 700)
    merged = weight + 1e-3 * torch.randn(3000, 1) @ torch.randn(1, 200)
    added = torch.cat([weight[:-1], weight[-1:] + 1])  # a new word's row
    prints = [
        fingerprint(weight=weight, positions=positions),
        fingerprint(weight=merged, positions=positions),
        fingerprint(weight=added, positions=positions),
        fingerprint(weight=weight, positions=positions + 1e-3),
    ]
    assert len(set(prints)) == 4


def test_configs_are_read(directory):
    checkpoint = open_checkpoint(directory)
    vision, qformer = VisionConfig.of(checkpoint), QFormerConfig.of(checkpoint)
    assert (vision.hidden_size, vision.image_size, vision.patch_size) == (16, 28, 14)
    assert vision.num_tokens == 5
    assert (qformer.hidden_size, qformer.encoder_hidden_size) == (24, 16)
    assert qformer.num_query_tokens == 4
    assert OPTConfig.of(checkpoint).ffn_dim == 256
    assert image_token_index(checkpoint) is None


def test_defaults_are_those_of_transformers(copy):
    from transformers import Blip2Config

    reference = Blip2Config(text_config={"model_type": "opt"})
    (copy / "config.json").write_text(json.dumps({"model_type": "blip-2", "qformer_config": {}}))
    checkpoint = open_checkpoint(copy)
    for ours, theirs in (
        (VisionConfig.of(checkpoint), reference.vision_config),
        (QFormerConfig.of(checkpoint), reference.qformer_config),
        (OPTConfig.of(checkpoint), reference.text_config),
    ):
        for name, value in vars(ours).items():
            owner = reference if name == "num_query_tokens" else theirs
            name = name.replace("post_layernorm_eps", "layer_norm_eps")  # one for all there
            assert getattr(owner, name) == value, name


def test_older_and_newer_spellings(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"] |= {"image_size": [28, 28], "layer_norm_eps": 1}
    config["vision_config"] |= {"post_layernorm_eps": 0.5}  # LAVIS's alone, to transformers nothing
    config |= {"image_token_index": 95}
    del config["text_config"]["word_embed_proj_dim"]
    (copy / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(copy)
    assert VisionConfig.of(checkpoint).image_size == 28
    assert VisionConfig.of(checkpoint).layer_norm_eps == 1.0
    assert VisionConfig.of(checkpoint).post_layernorm_eps == 1.0
    assert OPTConfig.of(checkpoint).word_embed_proj_dim == 64
    assert image_token_index(checkpoint) == 95


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("vision_config", {"hidden_size": 0}, "hidden_size is 0"),
        ("vision_config", {"hidden_size": "16"}, "hidden_size is '16'"),
        ("vision_config", {"num_attention_heads": 3}, "no multiple of num_attention_heads 3"),
        ("vision_config", {"image_size": [28, 56]}, "not square"),
        ("vision_config", {"qkv_bias": None}, "qkv_bias is None"),
        ("text_config", {"model_type": "t5"}, "is t5, not OPT"),
        (None, {"qformer_config": 3}, "qformer_config is 3"),
        (None, {"model_type": "llava"}, "type 'llava'"),
    ],
)
def test_wrong_configs_are_refused(copy, part, fields, message):
    config = json.loads((copy / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (copy / "config.json").write_text(json.dumps(config))

    def read_all():
        for view in (VisionConfig, QFormerConfig, OPTConfig):
            view.of(open_checkpoint(copy))

    with pytest.raises(Blip2Error, match=re.escape(message)) as error:
        read_all()
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "damage",
    [_truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("<html>" * 9)],
    ids=["truncated", "empty", "html"],
)
def test_damaged_weights_are_named(model, tmp_path, container, damage):
    if container == "bin":
        opt_models.save_pickles(model, tmp_path)
        file = tmp_path / "pytorch_model.bin"
    else:
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    damage(file)
    with pytest.raises(Blip2Error, match=re.escape(str(file))) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(Blip2Error, match=f"{shard.name} is missing"):
        open_checkpoint(tmp_path)


def test_index_that_promises_more_than_its_shards_hold(model, tmp_path):
    opt_models.save_pickles(model, tmp_path, shards=2)
    index = tmp_path / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "pytorch_model-00001.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(Blip2Error, match="ghost"):
        open_checkpoint(tmp_path)


def test_pickle_that_runs_code_is_refused_and_not_run(model, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    model.config.save_pretrained(tmp_path)
    torch.save({"weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Blip2Error, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_missing_parts_are_refused(copy, tmp_path, monkeypatch):
    with pytest.raises(Blip2Error, match="has no tensor nope"):
        open_checkpoint(copy).tensor("nope")
    (copy / "model.safetensors").unlink()
    with pytest.raises(Blip2Error, match="holds no weights"):
        open_checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(Blip2Error, match=r"config\.json does not exist"):
        open_checkpoint(copy)
    with pytest.raises(Blip2Error, match="is no directory"):
        open_checkpoint(tmp_path / "absent")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Blip2Error, match=r"cannot be downloaded .* give its directory"):
        open_checkpoint("nobody/nothing-here")


def test_hub_download_falls_back_to_pickles(model, tmp_path, monkeypatch):
    opt_models.save_pickles(model, tmp_path)
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("some/model").path == tmp_path
    assert "*.safetensors" in asked[0][1]
    assert "pytorch_model*.bin" in asked[1][1]
    asked.clear()
    model.save_pretrained(tmp_path)
    open_checkpoint("some/model")
    assert len(asked) == 1


def test_opt_alone_is_recognised_and_has_no_vision(tmp_path):
    opt_models.opt().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "opt"
    assert OPTConfig.of(checkpoint).hidden_size == 64
    with pytest.raises(Blip2Error, match="OPT checkpoint, which has no vision_config"):
        VisionConfig.of(checkpoint)

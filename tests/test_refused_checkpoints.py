"""Checkpoints that only look as if they could be answered from are named, with what would do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import opt_models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def blip2(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("blip2")
    opt_models.blip2().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(blip2, tmp_path) -> Path:
    return shutil.copytree(blip2, tmp_path / "checkpoint")


def edit(directory: Path, part: str | None = None, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (directory / "config.json").write_text(json.dumps(config))


def change(directory: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to the weights, by name with __ for the dots, or replace them."""
    state = load_file(directory / WEIGHTS)
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(Blip2Error, match=re.escape(message)) as error:
        open_checkpoint(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)
    assert "; " in str(error.value)  # what to do


SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"hidden_size": 16, "image_size": 28, "patch_size": 14, **SMALL}
QFORMER = {"hidden_size": 24, "vocab_size": 9, "encoder_hidden_size": 16, **SMALL}


def make(name: str) -> transformers.PreTrainedModel:
    """A small model of transformers' class of that name."""
    cls = getattr(transformers, name)
    if name == "Blip2VisionModel":
        return cls(transformers.Blip2VisionConfig(**VISION))
    if name == "Blip2QFormerModel":
        return cls(transformers.Blip2QFormerConfig(**QFORMER))
    opt = {"model_type": "opt", **opt_models.SHAPE}
    if name.startswith("Instruct"):
        return cls(
            transformers.InstructBlipConfig(
                vision_config=VISION, qformer_config=QFORMER, text_config=opt, image_token_index=95
            )
        )
    if name.startswith("BlipFor"):
        text = {"hidden_size": 16, "encoder_hidden_size": 16, "vocab_size": 99, **SMALL}
        text |= {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
        return cls(transformers.BlipConfig(text_config=text, vision_config=VISION))
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=opt, num_query_tokens=4
    )
    return cls(config)


@pytest.mark.parametrize(
    "name, message",
    [
        ("Blip2ForImageTextRetrieval", "Blip2ForImageTextRetrieval, a BLIP-2 that matches"),
        ("Blip2VisionModelWithProjection", "the picture half of a BLIP-2 that matches"),
        ("Blip2TextModelWithProjection", "the text half of a BLIP-2 that matches"),
        ("Blip2VisionModel", "BLIP-2's ViT alone"),
        ("Blip2QFormerModel", "BLIP-2's Q-Former alone"),
        ("InstructBlipForConditionalGeneration", "InstructBLIP, whose Q-Former reads the question"),
        ("BlipForConditionalGeneration", "BLIP, not BLIP-2"),
    ],
)
def test_other_models_are_named(tmp_path, name, message):
    make(name).save_pretrained(tmp_path)
    assert_refused(tmp_path, message)
    assert_refused(tmp_path, "give a BLIP-2 with OPT, such as Salesforce/blip2-opt-2.7b")


def test_a_matching_blip2_is_named_by_its_weights_too(tmp_path):
    make("Blip2ForImageTextRetrieval").save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    assert_refused(
        tmp_path, "a BLIP-2 that matches pictures with texts and answers nothing (it has"
    )


def test_flan_t5_is_named(copy):
    edit(copy, "text_config", model_type="t5")
    assert_refused(copy, "is t5, not OPT")


def test_the_model_without_a_task_has_all_of_it(tmp_path):
    """Blip2Model saves what Blip2ForConditionalGeneration saves, under its own name."""
    blip2 = opt_models.blip2()
    transformers.Blip2Model(blip2.config).save_pretrained(tmp_path)
    assert set(open_checkpoint(tmp_path).names) == set(blip2.state_dict()) - {
        "language_model.lm_head.weight"
    }


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
def test_quantised_by_its_config(copy, part, method):
    edit(copy, part, quantization_config={"quant_method": method})
    assert_refused(copy, f"is quantised ({method}); give the checkpoint it was made from")


Q_PROJ = "language_model.model.decoder.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("SCB", torch.float32),
        ("weight", torch.int8),
        ("weight", torch.uint8),
        ("weight.absmax", torch.float32),
        ("weight.quant_state.bitsandbytes__nf4", torch.uint8),
        ("qweight", torch.int32),
        ("scales", torch.float16),
        ("weight_scale", torch.float32),
        ("weight_scale_inv", torch.float32),
        ("weight_packed", torch.int32),
    ],
)
def test_quantised_by_its_weights(copy, name, dtype):
    """The names are those of bitsandbytes, GPTQ and AWQ, FP8 and compressed-tensors."""
    state = load_file(copy / WEIGHTS)
    state[Q_PROJ + name] = torch.ones(64, 64).to(dtype)
    if name == "scales":
        state[Q_PROJ + "qweight"] = torch.ones(64, 64, dtype=torch.int32)
    save_file(state, copy / WEIGHTS, metadata={"format": "pt"})
    assert_refused(copy, "is quantised (")


def test_fp8_weights_are_refused_in_either_container(tmp_path):
    model = opt_models.blip2()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[Q_PROJ + "weight"] = state[Q_PROJ + "weight"].to(torch.float8_e4m3fn)
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "is quantised (" + Q_PROJ + "weight is float8_e4m3fn)")
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert_refused(tmp_path, "is quantised (" + Q_PROJ + "weight is float8_e4m3fn)")


def test_position_ids_are_no_quantised_weights(copy):
    change(copy, qformer__embeddings__position_ids=torch.arange(5)[None])
    open_checkpoint(copy)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_beside_a_model_and_alone(copy, weights):
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (copy / weights).write_bytes(b"")
    assert_refused(copy, "has an adapter (adapter_config.json) that is not merged")
    (copy / "config.json").unlink()
    (copy / WEIGHTS).unlink()
    assert_refused(copy, "has an adapter (adapter_config.json) that is not merged")
    (copy / "adapter_config.json").unlink()
    assert_refused(copy, f"has an adapter ({weights}) that is not merged")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_A.default.weight"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_magnitude_vector.default.weight"),
        lambda name: name.replace("fc1.weight", "fc1.ia3_l.default"),
        lambda name: name.replace(
            "language_projection.", "language_projection.modules_to_save.default."
        ),
    ],
    ids=["all of PEFT's", "base layers", "LoRA", "DoRA", "IA3", "modules to save"],
)
def test_adapters_among_the_weights(copy, rename):
    state = {rename(name): tensor for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file(state, copy / WEIGHTS, metadata={"format": "pt"})
    assert_refused(copy, "has an adapter's weights (")


@pytest.mark.parametrize("part", [None, "vision_config", "qformer_config", "text_config"])
@pytest.mark.parametrize(
    "key, value",
    [
        ("per_layer_config", {"0": {"num_attention_heads": 4}}),
        ("transformers_weights", "others.safetensors"),
    ],
)
def test_what_transformers_would_read_from_elsewhere(copy, part, key, value):
    edit(copy, part, **{key: value})
    assert_refused(copy, key)


def test_query_tokens_of_another_number(tiny_checkpoint, tmp_path):
    from blip2.vision import modules

    copy = shutil.copytree(tiny_checkpoint.checkpoint, tmp_path / "copy")
    edit(copy, num_query_tokens=5)
    with pytest.raises(Blip2Error, match=r"query_tokens has shape \(1, 4, 32\), config.json asks"):
        modules.check_checkpoint(open_checkpoint(copy))

"""Any value of any key of a checkpoint's files: what transformers makes of it, or a refusal.

transformers refusing too, or making what its own model could not take, says nothing about us.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import models
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2 import images, prompts
from blip2.checkpoints import open_checkpoint
from blip2.engines import Places
from blip2.errors import Blip2Error
from blip2.language import conversion
from blip2.pipeline import open_pipeline

fuzz = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
T = TypeVar("T")
ABSENT = "absent"  # in place of a value: the key is left out


def objects(keys: dict[str, list], at_most: int = 3) -> st.SearchStrategy[dict]:
    """JSON objects with some of the keys, each with one of its values."""
    pairs = [(key, value) for key, values in keys.items() for value in values]
    return st.lists(st.sampled_from(pairs), max_size=at_most).map(dict)


def write(directory: Path, name: str, content: dict | None) -> None:
    path = directory / name
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(content))


def or_refused(function: Callable[[], T]) -> T | None:
    """What the function returns; None where it refuses in one line."""
    try:
        return function()
    except Blip2Error as error:
        message = str(error)
    assert "\n" not in message
    return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A BLIP-2 to edit, with transformers' own files only."""
    directory = tmp_path_factory.mktemp("fuzz")
    models.tiny_blip2(directory, seed=3)
    shutil.copy(directory / "config.json", directory / "whole.json")
    return directory


SIDE = 28
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
SIZES = [
    SIDE,
    [SIDE, SIDE],
    {"height": SIDE, "width": SIDE},
    {"height": SIDE, "width": SIDE, "shortest_edge": None},
    {"height": SIDE, "width": 14},
    {"shortest_edge": SIDE},
    {"longest_edge": SIDE},
    {"height": SIDE},
    {},
    14,
    0,
    None,
]
SWITCH = [True, False, None, 0, "no"]
PROCESSOR = {
    "image_processor_type": [
        "BlipImageProcessor",
        "BlipImageProcessorFast",
        "CLIPImageProcessor",
        None,
    ],
    "do_resize": SWITCH,
    "do_rescale": SWITCH,
    "do_normalize": SWITCH,
    "do_convert_rgb": SWITCH,
    "do_center_crop": SWITCH,
    "do_pad": SWITCH,
    "size": SIZES,
    "crop_size": SIZES,
    "pad_size": SIZES,
    "default_to_square": SWITCH,
    "resample": [0, 1, 2, 3, 4, 5, 6, -1, None, True, 2.0, "bicubic"],
    "rescale_factor": [0, 1, 0.5, 1 / 127.5, -1, 1e300, None, "1"],
    "image_mean": [0, 0.5, [0.1, 0.2, 0.3], [0.1, 0.2], [], None, 1],
    "image_std": [1, 0.5, [0.1, 0.2, 0.3], [0.1, 0.2], [], None, 0],
    "data_format": ["channels_last", None],
    "processor_class": ["Blip2Processor"],
    "num_query_tokens": [9],
    "rubbish": [1],
}
described = st.one_of(st.none(), objects(PROCESSOR))


@settings(fuzz, max_examples=300)
@given(described, described, st.booleans())
@example({}, {"do_normalize": False, "do_rescale": False}, True)
@example({"resample": 2}, {"resample": 0}, True)  # transformers 5's file before transformers 4's
@example({"resample": 2}, {"resample": 0}, False)
def test_pixels(checkpoint, old, new, nested):
    usual = {"image_processor_type": "BlipImageProcessor", "size": SIDE}
    old = None if old is None else usual | old
    new = None if new is None else usual | new
    if new is not None and nested:
        new = {"processor_class": "Blip2Processor", "image_processor": new}
    write(checkpoint, "preprocessor_config.json", old)
    write(checkpoint, "processor_config.json", new)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
        theirs = processor(PICTURE, return_tensors="pt").pixel_values[0].float()
    except Exception:
        return
    if theirs.shape != (3, SIDE, SIDE) or not torch.isfinite(theirs).all():
        return
    preprocessing = or_refused(lambda: images.Preprocessing.of(open_checkpoint(checkpoint)))
    if preprocessing is not None:
        assert np.array_equal(images.pixel_values(PICTURE, preprocessing), theirs.numpy())


DEMO = Path(__file__).parent.parent / "demo" / "checkpoint" / "tokenizer.json"
LAST = 440  # the demo's <image>, behind which words are added


def token(content: str, **flags: bool) -> dict:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, **plain, "special": False, **flags}


ADDED = [
    token("[VQA]", special=True),
    token("<color>"),
    token("redd", normalized=True),
    token("squ", single_word=True),
    token("<nl>", lstrip=True, rstrip=True),
    token("[VQA]", special=True, lstrip=True),
]
TEXTS = [
    "",
    "Question: what colour is the circle? Answer:",
    "[VQA] what <color> is it, reddish? <nl>  a squ, a square",
    "  a\n\nb  [VQA][VQA]<color>redd naïve 猫 🐈 .",
]
CONFIG = {
    "tokenizer_class": [
        "GPT2Tokenizer",
        "GPT2TokenizerFast",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        "T5Tokenizer",
        None,
    ],
    "add_bos_token": [True, False, None],
    "add_eos_token": [True, False],
    "add_prefix_space": [True, False],
    "bos_token": ["</s>", "<s>", token("</s>", normalized=True)],
    "eos_token": ["</s>", None],
    "unk_token": ["</s>", "<unk>", None],
    "pad_token": ["<pad>", "<missing>", None],
    "mask_token": ["<unk>"],
    "additional_special_tokens": [["[VQA]"], ["[VQA]", "<s>"], ["red"], []],
    "extra_special_tokens": [["[VQA]"], {"image_token": "<image>"}, [token("<color>")]],
    "image_token": ["<image>"],
    "clean_up_tokenization_spaces": [True],
    "split_special_tokens": [True, False],
    "model_max_length": [4],
    "padding_side": ["left"],
    "truncation_side": ["left"],
    "errors": ["strict"],
    "rubbish": [1],
}


@st.composite
def tokenizer_files(draw) -> dict[str, str]:
    """The files of a directory, by name."""
    whole = json.loads(DEMO.read_text(encoding="utf-8"))
    words = draw(st.lists(st.sampled_from(ADDED), max_size=3, unique_by=lambda t: t["content"]))
    ids = [LAST + 1 + i + draw(st.sampled_from([0, 0, 0, 0, 1])) for i in range(len(words))]
    config = draw(st.one_of(st.none(), objects(CONFIG, 5)))
    files = {}
    if draw(st.booleans()):
        whole["added_tokens"] += [{"id": i, **t} for i, t in zip(ids, words, strict=True)]
        whole["post_processor"] = draw(
            st.sampled_from([whole["post_processor"]] * 3 + [None, BYTE_LEVEL, NOTHING])
        )
        whole["normalizer"] = draw(st.sampled_from([None] * 5 + [{"type": "Lowercase"}]))
        files["tokenizer.json"] = json.dumps(whole)
        words = words[draw(st.integers(0, len(words))) :]
        ids = ids[len(ids) - len(words) :]
    else:
        vocabulary = {**whole["model"]["vocab"], "<image>": LAST}
        files["vocab.json"] = json.dumps(vocabulary)
        merges = "\n".join(" ".join(pair) for pair in whole["model"]["merges"])
        files["merges.txt"] = f"#version: 0.2\n{merges}\n"
    if config is not None and draw(st.booleans()):
        stated = {str(index): token for index, token in zip(ids, words, strict=True)}
        config = {**config, "added_tokens_decoder": stated}
    elif draw(st.booleans()):
        contents = [word["content"] for word in words]
        files["added_tokens.json"] = json.dumps(dict(zip(contents, ids, strict=True)))
    # Where nothing is named, OPT's own are meant: transformers would add GPT-2's.
    if "vocab.json" in files or draw(st.booleans()):
        files["special_tokens_map.json"] = json.dumps({"bos_token": "</s>"} | draw(objects(NAMES)))
    if config is not None:
        files["tokenizer_config.json"] = json.dumps({"bos_token": "</s>"} | config)
    return files


# Not additional_special_tokens: in that file transformers 4 read it, and 5 forgets it.
NAMES = {
    name: CONFIG[name]
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "image_token")
} | {"extra_special_tokens": [["[VQA]"], [token("<color>")]]}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": False,
    "use_regex": True,
}
NOTHING = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


@settings(fuzz, max_examples=150)
@given(tokenizer_files())
def test_token_ids(tmp_path_factory, files):
    directory = tmp_path_factory.mktemp("tokenizer")
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    write(directory, "config.json", {"model_type": "blip-2"})
    ours = or_refused(lambda: prompts.load_tokenizer(directory))
    if ours is None:
        return
    backend = "TokenizersBackend" if "tokenizer.json" in files else "GPT2Tokenizer"
    try:
        theirs = getattr(transformers, backend).from_pretrained(directory)
    except Exception:
        return
    ours.save(directory / "exported")
    again = prompts.load_tokenizer(directory / "exported")
    for text in TEXTS:
        expected = theirs(text).input_ids
        if theirs("").input_ids == []:  # nothing says what is before a text: then it is BLIP-2's
            expected = [ours.bos_id, *expected]
        assert ours.encode(text) == again.encode(text) == expected
    for ids in ([*range(LAST + 5)], theirs(TEXTS[2]).input_ids):
        ids = [index for index in ids if index < ours.vocab_size]
        expected = theirs.decode(ids, skip_special_tokens=True).strip()
        assert ours.decode(ids) == again.decode(ids) == expected


PARTS = {
    None: {
        "num_query_tokens": [4, 5, None],
        "image_token_index": [300, 7, None],
        "tie_word_embeddings": [True, False],
        "use_decoder_only_language_model": [False],
        "eos_token_id": [7],
        "num_beams": [3],
        "architectures": [["Blip2ForConditionalGeneration"], ["Blip2Model"], None],
        "torch_dtype": ["float32"],
        "is_encoder_decoder": [True],
    },
    "vision_config": {
        "layer_norm_eps": [1e-5, 0.5, 1, "1e-6", None],
        "post_layernorm_eps": [0.5],
        "hidden_act": ["gelu", "gelu_new", "quick_gelu", "relu", "gelu_fast", "silu", 3],
        "qkv_bias": [True, False],
        "num_hidden_layers": [2, 3, 4],
        "num_attention_heads": [2, 4, 5],
        "image_size": [28, 42, [28, 28]],
        "patch_size": [14, 7],
        "attention_dropout": [0.9],
        "initializer_range": [9.0],
        "model_type": ["blip_2_vision_model", "clip_vision_model"],
    },
    "qformer_config": {
        "layer_norm_eps": [1e-5, 0.5],
        "hidden_act": ["gelu", "relu", "gelu_pytorch_tanh", "mish"],
        "cross_attention_frequency": [1, 2, 3],
        "encoder_hidden_size": [48, 7],
        "num_attention_heads": [2, 4],
        "hidden_dropout_prob": [0.9],
        "use_qformer_text_input": [True, False],
        "chunk_size_feed_forward": [2],
        "max_position_embeddings": [9],
        "vocab_size": [99],
        "position_embedding_type": ["relative_key"],
    },
    "text_config": {
        "eos_token_id": [202, [202], [202, 2], 2, None, -1, "202", ABSENT],
        "bos_token_id": [2, 7, None, ABSENT],
        "pad_token_id": [1, 5, None],
        "tie_word_embeddings": [True, False],
        "activation_function": ["relu", "gelu", "silu"],
        "do_layer_norm_before": [True, False],
        "_remove_final_layer_norm": [True, False],
        "enable_bias": [True, False],
        "layer_norm_elementwise_affine": [True, False],
        "word_embed_proj_dim": [64, None, 32],
        "num_attention_heads": [2, 4],
        "max_position_embeddings": [96, 95],
        "layer_norm_eps": [0.5],
        "scale_embedding": [True],
        "dropout": [0.9],
        "num_beams": [3],
        "do_sample": [True],
        "repetition_penalty": [9.0],
        "suppress_tokens": [[162]],
        "min_length": [9],
        "prefix": ["</s>"],
        "model_type": ["opt", "gpt2"],
    },
}
GENERATION = {
    "eos_token_id": [202, 162, [2, 202]],
    "num_beams": [4],
    "do_sample": [True],
    "repetition_penalty": [9.0],
    "suppress_tokens": [[162]],
    "forced_bos_token_id": [9],
    "max_new_tokens": [2],
    "no_repeat_ngram_size": [1],
}
CHANGES = [(part, key, v) for part, keys in PARTS.items() for key, vs in keys.items() for v in vs]


def generated(directory: Path, pixel_values: torch.Tensor) -> str | None:
    """The text that transformers generates, None where it cannot."""
    try:
        model, loaded = transformers.Blip2ForConditionalGeneration.from_pretrained(
            directory, output_loading_info=True
        )
        if loaded["missing_keys"]:
            return None  # and then made of random numbers
        ids = model.generate(pixel_values=pixel_values, max_new_tokens=12)[0].tolist()
        ids = ids[model.config.num_query_tokens + 1 :]  # the prompt is returned too
    except Exception:
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def answered(directory: Path, pixel_values: torch.Tensor) -> str:
    """The text that the suite answers for the checkpoint as it lies there."""
    converted = directory / "converted"
    opened = open_checkpoint(directory)
    config = conversion.target_config(opened, conversion.ConversionOptions(dtype="float32"))
    conversion.convert(opened, config, converted)
    pipeline = open_pipeline(Places.of(directory, converted))
    options = pipeline.options({"max_output_len": 12})
    return pipeline.answer(pixel_values, [""], options)[0][0].text


@settings(fuzz, max_examples=24)  # each opens two models of each kind
@given(st.lists(st.sampled_from(CHANGES), max_size=2), st.one_of(st.none(), objects(GENERATION)))
@example([], {"eos_token_id": 162, "num_beams": 4})  # which BLIP-2 does not read
@example([("text_config", "eos_token_id", 162)], None)
@example([("text_config", "eos_token_id", ABSENT)], None)
def test_answers(checkpoint, changes, generation):
    write(checkpoint, "preprocessor_config.json", None)
    write(checkpoint, "processor_config.json", None)
    whole = json.loads((checkpoint / "whole.json").read_text())
    for part, key, value in changes:
        fields = whole[part] if part else whole
        fields.pop(key, None) if value is ABSENT else fields.update({key: value})
    write(checkpoint, "config.json", whole)
    write(checkpoint, "generation_config.json", generation)
    pixel_values = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    theirs = generated(checkpoint, pixel_values)
    if theirs is not None:
        ours = or_refused(lambda: answered(checkpoint, pixel_values))
        assert ours in (None, theirs)

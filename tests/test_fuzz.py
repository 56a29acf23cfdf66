"""Whatever bytes, JSON or text comes in: an answer, or one line that says what is wrong.

A traceback fails the test as any exception does; a hang does by an alarm.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import opt_models
import pytest
import torch
from bad_inputs import QFORMER, VIT, encoded, noise
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import tiny_tokenizer

from blip2 import artifacts, images
from blip2.checkpoints import open_checkpoint
from blip2.engines import open_vision_session
from blip2.errors import Blip2Error
from blip2.language import conversion
from blip2.language.native.checkpoint import read_config
from blip2.language.trtllm_engine import EngineConfig
from blip2.prompts import Tokenizer
from blip2.vision import modules

HANGS_AFTER_S = 60
fuzz = settings(
    deadline=None,  # how long one example takes depends on the machine
    database=None,
    derandomize=True,  # a change fails by its own doing
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _alarm():
    def hang(*_):
        pytest.fail(f"one input has kept us busy for {HANGS_AFTER_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def survives(function, *arguments):
    """What the function returns; None where it refuses in one line."""
    signal.alarm(HANGS_AFTER_S)
    try:
        return function(*arguments)
    except Blip2Error as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return None


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
FILES = [encoded(noise(), kind) for kind in FORMATS]
FILES += [
    encoded(noise(mode), kind) for mode, kind in (("P", "PNG"), ("CMYK", "TIFF"), ("F", "TIFF"))
]


@st.composite
def damaged(draw, files: list[bytes]) -> bytes:
    """A whole file in which some bytes are others, or that ends early."""
    content = bytearray(draw(st.sampled_from(files)))
    # Headers are where the decisions are.
    places = st.one_of(st.integers(0, min(200, len(content) - 1)), st.integers(0, len(content) - 1))
    for place, value in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@fuzz
@given(st.one_of(damaged(FILES), st.binary(max_size=300)))
def test_pictures(content):
    image = survives(images.decode_image, content, "picture")
    if image is not None:
        assert image.mode == "RGB"
        assert np.isfinite(images.pixel_values(image, images.Preprocessing(8, 8))).all()


numbers = st.one_of(st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**30]), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def edited(draw, whole: dict) -> dict:
    """A JSON object of which one or two entries, at any depth, are others or missing."""
    facts = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        inner, key = facts, draw(st.sampled_from(sorted(facts)))
        while isinstance(inner[key], dict) and inner[key] and draw(st.booleans()):
            inner, key = inner[key], draw(st.sampled_from(sorted(inner[key])))
        if draw(st.integers(0, 4)):
            inner[key] = draw(values)
        else:
            del inner[key]
            if not facts:
                break
    return facts


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F16", "shape": [1, 2], "data_offsets": [8, 12]},
}


@settings(fuzz, max_examples=60)
@given(edited(HEADER), st.integers(-3, 3), st.integers(0, 20))
@example(HEADER, 0, 12)
def test_safetensors_headers(tmp_path, header, off, size):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", max(0, len(text) + off)) + text + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    checkpoint = survives(open_checkpoint, tmp_path)
    if checkpoint is not None:
        for name in checkpoint.names:
            survives(checkpoint.tensor, name)
        survives(lambda: checkpoint.fingerprint)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


PICKLES = [saved({"a": torch.ones(3), "b": torch.ones(2, 2).half()}), saved(torch.ones(1, 2, 3))]


@fuzz
@given(st.one_of(damaged(PICKLES), st.binary(max_size=60)))
def test_pickles(tmp_path, content):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    survives(open_checkpoint, tmp_path)
    tensor = survives(artifacts.load_tensor, file, "test")
    assert tensor is None or torch.isfinite(tensor).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fuzzed")
    opt_models.blip2().save_pretrained(directory)
    return directory


CONFIG = opt_models.blip2().config.to_dict()


@settings(fuzz, max_examples=50)
@given(st.data())
def test_checkpoint_configurations(checkpoint, data):
    (checkpoint / "config.json").write_text(json.dumps(data.draw(edited(CONFIG)), default=str))
    opened = survives(open_checkpoint, checkpoint)
    if opened is not None:
        survives(modules.check_checkpoint, opened)
        survives(conversion.target_config, opened, conversion.ConversionOptions())
        survives(images.Preprocessing.of, opened)


PROCESSOR = {
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "do_center_crop": False,
}


@fuzz
@given(edited(PROCESSOR))
def test_image_processors(tmp_path, processor):
    (tmp_path / "config.json").write_text(
        '{"model_type": "blip-2", "vision_config": {"image_size": 28}}'
    )
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    preprocessing = survives(images.Preprocessing.of, open_checkpoint(tmp_path))
    if preprocessing is not None:
        pixels = survives(images.pixel_values, noise(), preprocessing)
        assert pixels is None or (pixels.shape == (3, 28, 28) and np.isfinite(pixels).all())


@pytest.fixture(scope="module")
def exported(tiny_export, tmp_path_factory) -> Path:
    return Path(
        shutil.copytree(tiny_export.output, tmp_path_factory.mktemp("sidecars"), dirs_exist_ok=True)
    )


@settings(fuzz, max_examples=12)  # each opens both networks
@pytest.mark.parametrize("name", [VIT, QFORMER, "query_tokens"])
@given(st.data())
def test_sidecars(exported, name, data):
    sidecar = (exported / name).with_suffix(".json")
    whole = sidecar.read_text()
    try:
        sidecar.write_text(json.dumps(data.draw(edited(json.loads(whole)))))
        session = survives(open_vision_session, exported / "onnx", exported / "query_tokens.pt")
        if session is not None:
            session.qformer(session.vit(torch.zeros(1, 3, 28, 28)))
    finally:
        sidecar.write_text(whole)


OPT_CONFIG = {
    "architecture": "OPTForCausalLM",
    "dtype": "float16",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "hidden_act": "relu",
    "quantization": {"quant_algo": "W8A16"},
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "do_layer_norm_before": True,
}
ENGINE_CONFIG = {
    "version": "1.2.1",
    "pretrained_config": OPT_CONFIG,
    "build_config": {
        "max_batch_size": 4,
        "max_input_len": 40,
        "max_seq_len": 60,
        "max_beam_width": 5,
        "max_prompt_embedding_table_size": 16,
        "kv_cache_type": "PAGED",
        "plugin_config": {"gpt_attention_plugin": "float16", "remove_input_padding": True},
    },
}


NO_TABLE = {
    "build_config": ENGINE_CONFIG["build_config"] | {"max_prompt_embedding_table_size": None}
}


@fuzz
@given(st.one_of(edited(OPT_CONFIG), edited(ENGINE_CONFIG)))
@example(ENGINE_CONFIG | NO_TABLE)
def test_opt_configurations(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    survives(EngineConfig.read, tmp_path)
    survives(read_config, tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


@fuzz
@given(st.text(st.characters(exclude_categories=())))
@example("\0")
@example("</s><image>\n")
@example("\ud800")
def test_prompts(tokenizer, text):
    ids = survives(tokenizer.encode, text)
    if ids is None:
        assert any("\ud800" <= character <= "\udfff" for character in text)
    else:
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.decode(ids[1:]) == text.strip()

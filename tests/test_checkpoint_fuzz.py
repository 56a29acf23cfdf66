"""Any value of any key of a checkpoint's files: what transformers makes of it, or a refusal.

transformers refusing too, or making what its own model could not take, says nothing about us.
"""

from __future__ import annotations

import json
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

from blip2 import images
from blip2.artifacts import UserError
from blip2.checkpoints import open_checkpoint

fuzz = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
T = TypeVar("T")


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
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A BLIP-2 to edit, with transformers' own files only."""
    directory = tmp_path_factory.mktemp("fuzz")
    models.tiny_blip2(directory, seed=3)
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
        assert torch.equal(images.pixel_values(PICTURE, preprocessing), theirs)

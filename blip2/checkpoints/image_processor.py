"""How a checkpoint wants its pictures prepared, by the rules of transformers' BlipImageProcessor.

transformers 4 wrote preprocessor_config.json; transformers 5 writes the same under
`image_processor` in processor_config.json, and reads that first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2 import artifacts
from blip2.checkpoints.configs import VisionConfig
from blip2.checkpoints.reader import Checkpoint

_CLASSES = ("BlipImageProcessor", "BlipImageProcessorFast", "BlipImageProcessorPil")
# A step that is switched off is one with a constant that changes nothing.
_SWITCHES = {
    "do_rescale": {"rescale_factor": 1},
    "do_normalize": {"image_mean": 0, "image_std": 1},
}
_NAMES = {
    "image_mean": "mean",
    "image_std": "std",
    "resample": "resample",
    "rescale_factor": "rescale_factor",
}


def description(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]]:
    """Where a checkpoint's image processor is described, and how; empty where nowhere.

    Raises:
        Blip2Error: a file there is no JSON object.
    """
    path = checkpoint.path / "preprocessor_config.json"
    if checkpoint.is_of_lavis:
        return path, {}
    again = "downloading the checkpoint again"
    newer = checkpoint.path / "processor_config.json"
    if newer.is_file():
        fields = artifacts.read_json(newer, again).get("image_processor")
        if fields is not None:
            return newer, fields
    return path, artifacts.read_json(path, again) if path.is_file() else {}


def arguments(fields: Mapping[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """A description as arguments of `images.Preprocessing`; what it leaves out is left out there.

    Raises:
        ValueError, TypeError, AttributeError: it asks for what BLIP-2's preprocessing has not.
    """
    name = fields.get("image_processor_type")
    if name not in (None, *_CLASSES):
        raise ValueError(f"it is a {name}, not a {_CLASSES[0]}")
    for switch in ("do_resize", *_SWITCHES, "do_center_crop", "do_pad"):
        if fields.get(switch) not in (None, True, False):
            raise ValueError(f"{switch} is {fields[switch]!r}")
    side = vision.image_size
    if not fields.get("do_resize", True):
        raise ValueError(f"it leaves pictures at their sizes, the ViT takes {side} x {side}")
    for step in ("do_center_crop", "do_pad"):
        if fields.get(step):
            raise ValueError(f"it asks for a step more, {step}")
    height, width = _size(fields.get("size", side), fields.get("default_to_square", True))
    if (height, width) != (side, side):
        raise ValueError(f"it makes {height} x {width}, the ViT takes {side} x {side}")
    for switch, constants in _SWITCHES.items():
        if not fields.get(switch, True):  # null is off too
            fields = {**fields, **constants}
    given = {ours: fields[theirs] for theirs, ours in _NAMES.items() if theirs in fields}
    for statistic in ("mean", "std"):
        if statistic in given:
            value = given[statistic]
            given[statistic] = tuple(value) if isinstance(value, list) else (value,) * 3
    return {"height": side, "width": side, **given}


def _size(size: Any, square: Any) -> tuple[Any, Any]:
    """Height and width, of the forms in which transformers takes them."""
    if isinstance(size, dict):
        size = {name: value for name, value in size.items() if value is not None}
        if size.keys() != {"height", "width"}:
            raise ValueError(f"its size is {size}, not a height and a width")
        return size["height"], size["width"]
    if isinstance(size, list):
        height, width = size
        return height, width
    if not square:
        raise ValueError(f"its size is {size} for the shorter side")
    return size, size

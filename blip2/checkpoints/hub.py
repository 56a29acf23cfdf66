"""Repositories of the Hugging Face hub, downloaded once and kept in its cache."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable
from pathlib import Path

from blip2.errors import Blip2Error, first_line

_SMALL = ["*.json", "*.txt", "*.model"]
_SAFETENSORS, _PICKLES = "*.safetensors", "pytorch_model*.bin"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@functools.cache  # the hub is asked once
def locate(location: str | Path) -> Path:
    """A directory as it is given, or that of a Hugging Face repository, downloaded if need be.

    Raises:
        Blip2Error: no such repository, or no network.
    """
    directory = Path(location)
    if directory.exists() or not _ID.fullmatch(str(location)):
        return directory
    return download(str(location))


def download(model_id: str) -> Path:
    """Fetch configuration, tokenizer and weights of a Hugging Face repository; return the folder.

    The .bin weights are fetched only where the repository has no safetensors.
    """
    if not _ID.fullmatch(model_id):
        raise Blip2Error(
            f"{model_id} is no directory",
            "give a checkpoint directory or a Hugging Face id such as Salesforce/blip2-opt-2.7b",
        )
    try:
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(model_id, allow_patterns=[*_SMALL, _SAFETENSORS]))
        if not any(directory.glob(_SAFETENSORS)):
            snapshot_download(model_id, allow_patterns=[*_SMALL, _PICKLES])
    except Exception as error:  # Which HTTP library's errors come out depends on the hub's version.
        raise Blip2Error(
            f"{model_id} is no directory, and cannot be downloaded ({first_line(error)})",
            "without a network, copy the checkpoint here and give its directory",
        ) from None
    return directory


def wanted(names: Iterable[str]) -> set[str]:
    """The files that `download` fetches of a repository that has these."""
    names = list(names)
    weights = _SAFETENSORS if fnmatch.filter(names, _SAFETENSORS) else _PICKLES
    return {name for pattern in (*_SMALL, weights) for name in fnmatch.filter(names, pattern)}


def is_weights(name: str) -> bool:
    """Whether a repository's file holds weights."""
    return fnmatch.fnmatch(name, _SAFETENSORS) or fnmatch.fnmatch(name, _PICKLES)

"""BLIP-2: ask questions about pictures, or caption them.

import blip2

model = blip2.load("Salesforce/blip2-opt-2.7b")
print(model.ask("photo.jpg", "which city is this?"))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from blip2.api import Answer, Features, Model, load

__all__ = ["Answer", "Blip2Error", "Features", "Model", "load"]

__version__ = "0.1.0"  # the one place: pyproject.toml and every program's --version read it here

# Nothing is sent anywhere: each library reads its switch when it is imported, which is after this.
for _switch, _off in {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime from 1.32 on: an id under the home directory, a host
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_switch, _off)

# Weights are gigabytes: PyTorch takes memory for them in pages of 2 MB, where Linux has such, for
# taking it in pages of 4 KB costs more than filling it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """What needs PyTorch, when it is asked for: the programs say --help without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blip2 import api

    return getattr(api, name)

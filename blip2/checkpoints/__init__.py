"""BLIP-2 and OPT checkpoints, as their makers meant them or refused: docs/checkpoints.md.

    checkpoint = open_checkpoint("Salesforce/blip2-opt-2.7b")       # or a local directory
    checkpoint.kind                                                 # "blip-2"
    QFormerConfig.of(checkpoint).num_hidden_layers                  # 12
    checkpoint.tensor("query_tokens")                               # 1 x 32 x 768

Opening reads descriptions only; a tensor's bytes are read when it is asked for, and let go with the
tensor.
"""

from __future__ import annotations

from blip2.checkpoints.configs import (
    OPTConfig,
    QFormerConfig,
    VisionConfig,
    image_token_index,
)
from blip2.checkpoints.generation import TokenIds
from blip2.checkpoints.hub import locate
from blip2.checkpoints.reader import Checkpoint, is_checkpoint, lavis_checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "OPTConfig",
    "QFormerConfig",
    "TokenIds",
    "VisionConfig",
    "image_token_index",
    "is_checkpoint",
    "lavis_checkpoint",
    "locate",
    "open_checkpoint",
]

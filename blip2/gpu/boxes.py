"""A matrix as Hopper's copies of boxes read it (TMA; `copy_box` in hopper.cuh)."""

from __future__ import annotations

import dataclasses

import torch

ROW_BYTES = (
    128  # of a box, whose 16-byte pieces are swapped about by row as the tensor cores read them
)


@dataclasses.dataclass(frozen=True)
class Boxes:
    """An argument of a kernel: boxes of so many `rows` (256 at most) of 128 bytes of a matrix, which
    is rows x columns, contiguous, a row's bytes a multiple of 16."""

    matrix: torch.Tensor
    rows: int

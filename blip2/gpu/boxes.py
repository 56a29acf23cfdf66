"""A matrix as Hopper's copies of boxes read it (TMA; `copy_box` in hopper_copies.cuh)."""

from __future__ import annotations

import dataclasses

import torch

# Of a box; its 16-byte pieces are swapped about by row, as the tensor cores read them.
ROW_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Boxes:
    """An argument of a kernel: boxes of so many `rows` (256 at most) of 128 bytes of a matrix.

    That is rows x columns in 16 bits, contiguous, its columns a multiple of 8.
    """

    matrix: torch.Tensor
    rows: int

"""A matrix as Hopper's copies of boxes read it (TMA; `copy_box` in hopper_copies.cuh)."""

from __future__ import annotations

import dataclasses

import torch

# Of a row, whose 16-byte pieces are swapped about by row, as the tensor cores read them.
SWIZZLED_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Boxes:
    """An argument of a kernel: boxes of so many `rows` (256 at most) of `row_bytes` of a matrix.

    That is rows x columns in 16 or 32 bits, contiguous, a row's bytes a multiple of 16. Boxes of
    SWIZZLED_BYTES a row are swizzled, wider ones (256 numbers at most) lie as the matrix does.
    """

    matrix: torch.Tensor
    rows: int
    row_bytes: int = SWIZZLED_BYTES

"""Greedy search as one kernel a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blip2.decoding import Greedy
from blip2.language.native import kernels
from blip2.language.native.layers import pdl_options
from blip2.language.session import GenerationOptions


class CudaGreedy(Greedy):
    """`Greedy` for logits that are the same tensor, or a contiguous one, at every step."""

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(options, input_ids, vocab_size, device)
        # Each row counts for itself, as the kernel's programs do not wait for one another.
        self._steps = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self._step = self._steps[:1]
        self._chosen = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self._pdl_options = pdl_options(torch.device(device))

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As in the base class; the tokens returned are overwritten by the next call."""
        if self._penalty.penalty != 1:
            return super().advance(logits)
        kernels.greedy_kernel[(self.rows,)](
            logits,
            self._chosen,
            self._tokens,
            self._steps,
            self._ended,
            self._sums,
            logits.shape[1],
            self._tokens.shape[1],
            self.options.end_id,
            self.options.pad_id,
            BLOCK=8192,
            num_warps=16,
            **self._pdl_options,
        )
        return self._chosen, None

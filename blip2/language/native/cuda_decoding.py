"""Greedy search as one kernel a step, and beam search as two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from blip2.gpu.kernel_launch import launch
from blip2.language.decoding import RULED_OUT, BeamSearch, Greedy, Sampling
from blip2.language.native import beam_kernels, kernels
from blip2.language.native.drawing import draw_tokens
from blip2.language.session import GenerationOptions

_BLOCKS = (1024, 2048, 4096, 8192)  # logits that candidates_kernel may search at a time
_MOST_CANDIDATES = 4096  # that beams_kernel chooses a request's beams from


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """As `OPTModel.likeliest`, of contiguous float32 scores on a GPU."""
    rows, vocab_size = scores.shape
    out = torch.empty((2, rows), dtype=torch.int64, device=scores.device)
    launch(
        kernels.likeliest_kernel,
        (rows,),
        scores,
        out,
        vocab_size,
        BLOCK=8192,
        num_warps=16,
        device=scores.device,
    )
    return out


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As `OPTModel.log_probs`, of contiguous float32 logits on a GPU."""
    rows, vocab_size = logits.shape
    out = torch.empty(rows, device=logits.device)
    launch(
        kernels.log_probs_kernel,
        (rows,),
        logits,
        tokens,
        out,
        vocab_size,
        BLOCK=8192,
        num_warps=16,
        device=logits.device,
    )
    return out


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
        self._has_kernel = _is_plain(options)

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As in the base class; the tokens returned are overwritten by the next call."""
        if not self._has_kernel:
            return super().advance(logits)
        launch(
            kernels.greedy_kernel,
            (self.rows,),
            logits,
            self._chosen,
            self._tokens,
            self._steps,
            self._ended,
            self._sums,
            self._log_probs,
            logits.shape[1],
            self._tokens.shape[1],
            self.options.end_id,
            self.options.pad_id,
            BLOCK=8192,
            num_warps=16,
            device=logits.device,
        )
        return self._chosen, None


class CudaSampling(Sampling):
    """`Sampling` for logits on a GPU."""

    def _draw(
        self, scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        return draw_tokens(scores, settings, drawn)


class CudaBeamSearch(BeamSearch):
    """`BeamSearch` for float32 logits that are contiguous."""

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(options, input_ids, vocab_size, device)
        # Each request counts for itself, as the kernel's programs do not wait for one another.
        self._steps = torch.zeros(self.requests, dtype=torch.int64, device=device)
        self._step = self._steps[:1]
        self._block = _block(vocab_size, self._kept) if _is_plain(options) else None
        if self._block is None:
            return
        self._chunks = triton.cdiv(vocab_size, self._block)

        def of_chunks(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty((self.rows, self._chunks, *shape), dtype=dtype, device=device)

        self._statistics = of_chunks(), of_chunks(), of_chunks()
        self._candidates = of_chunks(self._kept), of_chunks(self._kept, dtype=torch.int32)
        self._hopeless = torch.zeros_like(self._can_improve)
        self._next_tokens = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self._source_rows = torch.zeros_like(self._next_tokens)

    @property
    def _kept(self) -> int:
        return 2 * self.options.num_beams

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class; what is returned is overwritten by the next call."""
        if self._block is None:
            return super().advance(logits)
        places = triton.next_power_of_2(self._kept)
        launch(
            beam_kernels.candidates_kernel,
            (self.rows, self._chunks),
            logits,
            *self._statistics,
            *self._candidates,
            logits.shape[1],
            KEPT=self._kept,
            PLACES=places,
            BLOCK=self._block,
            num_warps=max(4, self._block // 512),
            device=logits.device,
        )
        launch(
            beam_kernels.beams_kernel,
            (self.requests,),
            *self._statistics,
            *self._candidates,
            self._norms,
            self._running_scores,
            self._scores,
            self._endings,
            self._is_finished,
            self._can_improve,
            self._hopeless,
            self._tokens,
            self._parents,
            self._steps,
            self._sums,
            self._next_tokens,
            self._source_rows,
            self._chunks,
            self._tokens.shape[1],
            self.options.end_id,
            NUM_BEAMS=self.options.num_beams,
            EARLY_STOPPING=self.options.early_stopping,
            RULED_OUT=RULED_OUT,
            BEAMS=triton.next_power_of_2(self.options.num_beams),
            PLACES=places,
            CHUNKS=triton.next_power_of_2(self._chunks),
            CANDIDATES=triton.next_power_of_2(self._chunks * self._kept),
            num_warps=8,
            device=logits.device,
        )
        return self._next_tokens, self._source_rows

    def ended(self) -> torch.Tensor:
        if self._block is None or self.options.early_stopping:
            return super().ended()
        return self._hopeless


def _is_plain(options: GenerationOptions) -> bool:
    """Whether the kernels know all that the options ask for; else PyTorch's operations choose."""
    return options.repetition_penalty == 1 and options.stop is None and not options.is_held


def _block(vocab_size: int, kept: int) -> int | None:
    """The fewest logits to search at a time; None where there would be too many candidates."""
    if vocab_size < kept:
        return None
    beams = triton.next_power_of_2(kept // 2)
    for block in _BLOCKS:
        chunks = triton.cdiv(vocab_size, block)
        if beams * triton.next_power_of_2(chunks * kept) <= _MOST_CANDIDATES:
            return block
    return None

"""The native OPT session: a checkpoint, PyTorch, and nothing else."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from blip2 import decoding
from blip2.artifacts import UserError
from blip2.devices import best_device
from blip2.language.native.checkpoint import open_tensors
from blip2.language.native.model import ACTIVATIONS, OPTModel
from blip2.language.session import Generation, GenerationOptions, LanguageSession, Limits
from blip2.language.trtllm_format import OPTCheckpointConfig


class NativeSession(LanguageSession):
    """Runs OPT with the values that the checkpoint's precision has.

    On an NVIDIA GPU (Ampere or later) in float16 with kernels of its own, else in float32 with
    PyTorch's, on the CPU or, for the few OPTs that the kernels do not take, on the GPU.
    """

    def __init__(self, directory: Path) -> None:
        """Open the checkpoint in `directory`, of which only descriptions are read yet.

        Raises:
            UserError: missing, damaged, or split over several GPUs.
        """
        self._tensors = open_tensors(directory)
        config = self._tensors.config
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"{directory} uses the activation {config.hidden_act}; the native session knows"
                f" {', '.join(ACTIVATIONS)}"
            )
        self.device = best_device()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self._model_class = _model_class(config, self.device)
        self.limits = Limits(
            max_total_len=config.max_position_embeddings,
            max_batch_size=self._model_class.max_batch_size,
            max_num_beams=config.vocab_size // 2,
        )
        self._model: OPTModel | None = None

    def load(self) -> None:
        """Read the weights; a second call does nothing.

        Raises:
            UserError: they are damaged.
        """
        if self._model is None:
            self._model = self._model_class.load(self._tensors, self.device)

    def limit_batch(self, size: int) -> None:
        super().limit_batch(size)
        if self._model is not None:
            self._model.release()

    @torch.inference_mode()
    def _generate(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
        first_request: int,
    ) -> list[Generation]:
        self.load()
        with self._model.computing():
            return self._decode(input_ids, prompt_table, options, first_request)

    def _decode(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
        first_request: int,
    ) -> list[Generation]:
        lengths = torch.tensor([len(ids) for ids in input_ids], device=self.device)
        padded = pad_sequence(list(input_ids), batch_first=True).long().to(self.device)
        cache = self._model.new_cache(lengths, options.num_beams, options.max_output_len)
        strategy = decoding.make_strategy(
            options,
            input_ids,
            self.vocab_size,
            first_request,
            self.device,
            self._model.greedy,
            self._model.beam_search,
        )

        logits = self._model.prefill(padded, lengths, prompt_table.to(self.device), cache)
        logits = logits.repeat_interleave(options.num_beams, dim=0)
        ends: collections.deque[_Flags] = collections.deque()
        for step in range(options.max_output_len):
            next_tokens, source_rows = strategy.advance(logits)
            if step == options.max_output_len - 1:
                break
            ends.append(_Flags(strategy.ended()))
            if len(ends) > self._model.steps_ahead and ends.popleft().all():
                break
            if source_rows is not None:
                cache.reorder(source_rows)
            logits = self._model.step(next_tokens, cache)
        if not strategy.finite():
            raise UserError(
                "the OPT yields NaN or Inf; make its checkpoint again from the original"
            )
        return strategy.results()


class _Flags:
    """Flags of the device, on their way to the host."""

    def __init__(self, flags: torch.Tensor) -> None:
        self._flags = flags.to("cpu", non_blocking=True, copy=True)  # a strategy updates its own
        self._copied = torch.cuda.Event() if flags.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def all(self) -> bool:
        """Whether all are set. Waits until they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flags.all())


def _model_class(config: OPTCheckpointConfig, device: torch.device) -> type[OPTModel]:
    if device.type == "cuda":
        try:
            from blip2.language.native.cuda import CudaModel
        except ImportError as error:
            raise UserError(
                f"on a GPU the native OPT session needs {error.name}; install it with: pip install -r"
                " requirements-gpu.txt"
            ) from None

        if CudaModel.runs(config):
            return CudaModel
    return OPTModel

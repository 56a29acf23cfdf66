"""The native OPT session: a checkpoint, PyTorch, and nothing else."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from blip2 import memory
from blip2.activations import ACTIVATIONS
from blip2.devices import best_device, describe, has_float8, sent
from blip2.errors import Blip2Error
from blip2.gpu.kernel_launch import compile_ahead
from blip2.language.native.checkpoint import open_tensors
from blip2.language.native.model import OPTModel
from blip2.language.rows import Rows
from blip2.language.session import Generation, GenerationOptions, LanguageSession, Limits
from blip2.language.trtllm_format import OPTCheckpointConfig
from blip2.layout import CONVERT, install

_ANSWER_MULTIPLE, _ROW_MULTIPLE = 64, 128  # of tokens, so that few requests ask for other rows


class NativeSession(LanguageSession):
    """Runs OPT with the values that the checkpoint's precision has.

    On an NVIDIA GPU (Ampere or later) in float16 with kernels of its own, else in float32 with
    PyTorch's, on the CPU or, for the few OPTs that the kernels do not take, on the GPU.
    """

    has_rows = True

    def __init__(self, directory: Path, precision: str | None = None) -> None:
        """Open the checkpoint in `directory`, of which only descriptions are read yet.

        `precision` is as `open_tensors` takes it.

        Raises:
            Blip2Error: missing, damaged, or split over several GPUs; or in FP8, and
                the device has none.
        """
        self._tensors = open_tensors(directory, precision)
        config = self._tensors.config
        if config.hidden_act not in ACTIVATIONS:
            raise Blip2Error(
                f"{directory} uses the activation {config.hidden_act}",
                f"the native session knows {', '.join(ACTIVATIONS)}",
            )
        self.device = best_device()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self._model_class = _model_class(config, self.device)
        if config.is_float8:
            _check_float8(directory, precision, self.device, self._model_class)
        self.limits = Limits(
            max_total_len=config.max_position_embeddings,
            max_batch_size=self._model_class.max_batch_size,
            max_num_beams=config.vocab_size // 2,
        )
        self._model: OPTModel | None = None
        self._compiled_cases: set[tuple] = set()

    def load(self) -> None:
        """Read the weights; a second call does nothing.

        Raises:
            Blip2Error: they are damaged.
        """
        if self._model is None:
            self._model = self._model_class.load(self._tensors, self.device)

    @torch.inference_mode()
    def prepare(self, lengths: Sequence[int], table_rows: int, options: GenerationOptions) -> None:
        self.load()
        if not self._model.has_kernels:
            return
        lengths = list(lengths)[: self.limits.max_batch_size]
        case = (len(lengths), max(lengths), table_rows, dataclasses.replace(options, seed=0))
        if case in self._compiled_cases:
            return
        self._compiled_cases.add(case)
        input_ids = [torch.zeros(length, dtype=torch.int64) for length in lengths]
        table = torch.zeros(len(lengths), table_rows, self.hidden_size, device=self.device)
        with compile_ahead():
            requests = _Requests(self._model, self.device, input_ids, options, 0)
            # What a random choice is made of has to be numbers.
            logits = requests.read_prompts(table).zero_()
            requests.append(*requests.strategy.advance(logits))

    def open_rows(self, capacity: int, prompt_len: int, max_output_len: int) -> Rows:
        self.load()
        max_new = -(-max_output_len // _ANSWER_MULTIPLE) * _ANSWER_MULTIPLE
        max_len = -(-(prompt_len + max_new) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        max_len = min(max_len, self.limits.max_total_len)
        if self.device.type == "cuda":  # half of what is free is for looks, prompts, and others
            room = memory.free_gpu_bytes(self.device) // 2
            while capacity > 1 and self._model.cache_bytes(capacity, max_len) > room:
                capacity //= 2
        while True:
            try:
                with torch.inference_mode():
                    return Rows(self._model, self.device, capacity, max_len, max_new)
            except Exception as error:
                if capacity == 1 or not memory.exhausted(error):
                    raise
            capacity //= 2
            memory.release()

    def halve_batch(self, size: int) -> int:
        if self._model is not None:
            self._model.release()
        return super().halve_batch(size)

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
        requests = _Requests(self._model, self.device, input_ids, options, first_request)
        strategy = requests.strategy
        logits = requests.read_prompts(prompt_table)
        ends: collections.deque[_Copied] = collections.deque()
        for step in range(options.max_output_len):
            chosen = strategy.advance(logits)
            if step == options.max_output_len - 1:
                break
            ends.append(_Copied(strategy.ended()))
            if len(ends) > self._model.steps_ahead and ends.popleft().wait().all():
                break
            logits = requests.append(*chosen)
        try:
            return strategy.results()
        except FloatingPointError:
            raise _not_finite() from None


class _Requests:
    """A batch on its way: its cache, and the strategy that chooses its tokens."""

    def __init__(
        self,
        model: OPTModel,
        device: torch.device,
        input_ids: Sequence[torch.Tensor],
        options: GenerationOptions,
        first_request: int,
    ) -> None:
        self._model, self._device, self._rows_each = model, device, options.rows
        lengths = torch.tensor([len(ids) for ids in input_ids])
        self._lengths = sent(lengths, device)
        self._input_ids = sent(pad_sequence(list(input_ids), batch_first=True).long(), device)
        self._cache = model.new_cache(
            self._lengths, options.rows, options.max_output_len, int(lengths.max())
        )
        self.strategy = model.new_strategy(options, input_ids, first_request, device)

    def read_prompts(self, prompt_table: torch.Tensor) -> torch.Tensor:
        """Logits after the prompts, rows x vocab_size."""
        table = prompt_table.to(self._device)
        logits = self._model.prefill(self._input_ids, self._lengths, table, self._cache)
        return logits.repeat_interleave(self._rows_each, dim=0)

    def append(self, tokens: torch.Tensor, source_rows: torch.Tensor | None) -> torch.Tensor:
        """Logits after one token more of each row, which may continue another row."""
        if source_rows is not None:
            self._cache.reorder(source_rows)
        return self._model.step(tokens, self._cache)


def _not_finite() -> Blip2Error:
    return Blip2Error("the OPT yields NaN or Inf", "make its checkpoint again from the original")


class _Copied:
    """A tensor of the device, on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True, copy=True)  # a strategy updates its own
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> torch.Tensor:
        """The copy, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def _model_class(config: OPTCheckpointConfig, device: torch.device) -> type[OPTModel]:
    if device.type == "cuda":
        try:
            from blip2.language.native.cuda import CudaModel
        except ImportError as error:
            raise Blip2Error(
                f"on a GPU the native OPT session needs {error.name}",
                f"install it with: {install('gpu')}",
            ) from None

        if CudaModel.runs(config):
            return CudaModel
    return OPTModel


def _check_float8(
    directory: Path, precision: str | None, device: torch.device, model_class: type[OPTModel]
) -> None:
    """Raise Blip2Error where an OPT in FP8 cannot run."""
    mend = (
        f"convert it to another with: {CONVERT}"
        if precision is None
        else "give another `precision`"
    )
    if not has_float8(device):
        raise Blip2Error(
            f"the OPT in {directory} is in FP8, which {describe(device)} has not: NVIDIA GPUs have it"
            " from compute capability 8.9 on",
            mend,
        )
    if not model_class.has_kernels:
        raise Blip2Error(
            f"the OPT in {directory} is in FP8, and has a form that the GPU's kernels do not take",
            mend,
        )

"""The GPU's cache whose rows requests take and leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from blip2.gpu.kernel_launch import launch
from blip2.language.native import kernels
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.layered_step import LayeredStep
from blip2.language.native.prompt import Prompt, is_captured, padded_length
from blip2.language.rows import prepared_rows

if TYPE_CHECKING:
    from blip2.language.native.cuda import CudaModel

Step = Callable[[torch.Tensor], torch.Tensor]

_STAGED = 16  # prompts of more have no graphs, and need no place of their own
_MOST_PROMPTS = 32  # kept


class CudaPool:
    """As `RowPool`. Few prompts are read into a cache of their own, and copied from there.

    A request that is alone lies in a cache of one row, for the step that is one kernel.
    """

    def __init__(self, model: CudaModel, capacity: int, max_len: int, device: torch.device) -> None:
        """Make it empty, for so many rows of so many tokens."""
        self._model = model
        self._cache = CudaCache(model.config, capacity, max_len, device)
        self._slots = torch.arange(max_len, device=device)
        self._own = torch.arange(capacity, dtype=torch.int32, device=device)[:, None]
        self._cache.sources.copy_(self._own.expand(-1, max_len))
        self._steps: dict[int, Step] = {}
        self._alone_cache = CudaCache(model.config, 1, max_len, device)
        self._alone_step = model.fused_step(self._alone_cache)
        self._is_alone = False  # whether row 0 lies there
        self._staging = CudaCache(model.config, min(capacity, _STAGED), max_len, device)
        self._prompts: dict[tuple[int, int, int], Prompt] = {}

    def read(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        rows: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """As `RowPool.read`; of beams the first row has the prompt."""
        self._leave_alone()
        cache, requests, first = self._cache, len(rows), rows[0][0]
        if requests > _STAGED and all(count == 1 for _, count in rows):
            # Side by side: what is read stays where it is written.
            cache.lengths[first : first + requests] = lengths
            prompt = self._prompt(cache.part(first, requests), input_ids, tables)
            return prompt(input_ids, lengths, tables)
        logits = []
        for at in range(0, requests, _STAGED):
            part = slice(at, at + _STAGED)
            read = self._read_staged(input_ids[part], lengths[part], tables[part], rows[part])
            logits.append(read.clone())  # the next few overwrite it
        return torch.cat(logits)

    def _read_staged(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        rows: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Read a few prompts where graphs were captured for, and copy them to their rows."""
        requests, staging, cache = len(rows), self._staging, self._cache
        # Few sizes have buffers and graphs: what is missing is the last prompt again.
        more = prepared_rows(requests) - requests
        filled = (
            torch.cat([tensor, tensor[-1:].expand(more, *tensor.shape[1:])])
            for tensor in (input_ids, lengths, tables)
        )
        ids, all_lengths, all_tables = filled
        prompt = self._prompt(staging.part(0, requests + more), ids, all_tables)
        logits = prompt(ids, all_lengths, all_tables)
        for number, (first, count) in enumerate(rows):
            cache.keys[:, first] = staging.keys[:, number]
            cache.values[:, first] = staging.values[:, number]
            # Of beams the first alone has anything to go on with: all of them continue it.
            cache.lengths[first : first + count] = lengths[number]
        return logits[:requests]

    def _prompt(self, cache: CudaCache, input_ids: torch.Tensor, tables: torch.Tensor) -> Prompt:
        """What reads such prompts into a cache; kept where it is a graph."""
        length = min(padded_length(*input_ids.shape), cache.max_len)
        shape = (len(input_ids), length, tables.shape[1])
        if (kept := self._prompts.get(shape)) is not None:
            return kept
        model = self._model
        prompt = Prompt(model.config, model.weights, cache, shape)
        if is_captured(shape) and shape[0] <= _STAGED:
            if len(self._prompts) >= _MOST_PROMPTS:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[shape] = prompt
        return prompt

    def step(self, tokens: torch.Tensor, _used: int) -> torch.Tensor:
        """As `RowPool.step`; the logits are overwritten by the next step of as many rows."""
        rows = len(tokens)
        if rows == 1 and self._alone_step is not None:
            if not self._is_alone:
                self._copy(self._cache, 0, self._alone_cache, 0)
                self._is_alone = True
            return self._alone_step(tokens)
        if rows not in self._steps:
            self._steps[rows] = LayeredStep(
                self._model.config, self._model.weights, self._cache, rows
            )
        return self._steps[rows](tokens)

    def move_rows(self, pairs: torch.Tensor) -> None:
        """As `RowPool.move_rows`: one kernel for all of them, and of each what it has."""
        cache = self._cache
        layers, rows, heads, max_len, head_size = cache.keys.shape
        launch(
            kernels.move_rows_kernel,
            (heads, layers, pairs.shape[1]),
            cache.keys,
            cache.values,
            cache.lengths,
            pairs,
            rows * heads * max_len * head_size,
            max_len * head_size,
            head_size,
            BLOCK=2048,
            device=pairs.device,
        )
        sources, targets = pairs
        cache.lengths[targets] = cache.lengths[sources]
        cache.sources[targets] = self._own[targets].expand(-1, max_len)

    def move(self, source: int, target: int, count: int) -> None:
        """As `RowPool.move`."""
        cache = self._cache
        for offset in range(count):
            self._copy(cache, source + offset, cache, target + offset)
        rows, taken = slice(source, source + count), slice(target, target + count)
        if count > 1:  # what its beams share moves with them
            lengths = cache.lengths[taken, None]
            moved = cache.sources[rows] - (source - target)
            cache.sources[taken] = torch.where(self._slots < lengths, moved, self._own[taken])
            cache.sources[target + count : source + count] = self._own[
                target + count : source + count
            ]
        else:
            cache.sources[taken] = self._own[taken]

    def forget(self, used: int) -> None:
        """As `RowPool.forget`."""
        self._cache.lengths[used:] = 0
        self._cache.sources[used:] = self._own[used:]

    def reorder(self, first: int, count: int, source_rows: torch.Tensor) -> None:
        """As `RowPool.reorder`: only the table of who shares what changes."""
        cache, rows = self._cache, slice(first, first + count)
        taken = cache.sources[rows].index_select(0, source_rows)
        answered = self._slots < cache.lengths[rows, None]
        cache.sources[rows] = torch.where(answered, taken, self._own[rows])

    def _leave_alone(self) -> None:
        if self._is_alone:
            self._copy(self._alone_cache, 0, self._cache, 0)
            self._is_alone = False

    def _copy(self, source: CudaCache, row: int, target: CudaCache, to: int) -> None:
        target.keys[:, to] = source.keys[:, row]
        target.values[:, to] = source.values[:, row]
        target.lengths[to] = source.lengths[row]

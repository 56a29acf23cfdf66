"""The GPU's cache whose rows requests take and leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.layered_step import LayeredStep
from blip2.language.rows import prepared_rows

if TYPE_CHECKING:
    from blip2.language.native.cuda import CudaModel

Step = Callable[[torch.Tensor], torch.Tensor]


class CudaPool:
    """As `RowPool`. Prompts are read into a cache of their own, and copied from there.

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
        self._prompts: CudaCache | None = None

    def read(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, tables: torch.Tensor
    ) -> torch.Tensor:
        """As `RowPool.read`; the logits are overwritten by the next prompts."""
        requests = len(input_ids)
        # Few sizes have buffers and graphs: what is missing is the last prompt again.
        filled = list(range(requests)) + [requests - 1] * (prepared_rows(requests) - requests)
        ids, lengths, tables = input_ids[filled], lengths[filled], tables[filled]
        self._prompts = self._model.new_cache(lengths, 1, 0)
        return self._model.prefill(ids, lengths, tables, self._prompts)[:requests]

    def place(self, rows: Sequence[tuple[int, int]], lengths: torch.Tensor) -> None:
        """As `RowPool.place`; of beams the first row has the prompt."""
        self._leave_alone()
        cache, device = self._cache, lengths.device
        firsts = torch.tensor([first for first, _ in rows], device=device)
        width = min(self._prompts.max_len, cache.max_len)
        for pool, read in ((cache.keys, self._prompts.keys), (cache.values, self._prompts.values)):
            pool[:, :, :, :width].index_copy_(1, firsts, read[:, : len(rows), :, :width])
        cache.lengths[firsts] = lengths
        for prompt, (first, count) in enumerate(rows):
            if count > 1:
                taken = slice(first, first + count)
                cache.lengths[taken] = lengths[prompt]
                shared = self._slots < lengths[prompt]
                cache.sources[taken] = torch.where(shared, first, self._own[taken])
        self._prompts = None

    def step(self, tokens: torch.Tensor, _used: int) -> torch.Tensor:
        """As `RowPool.step`; the logits are overwritten by the next step of as many rows."""
        rows = len(tokens)
        if rows == 1 and self._alone_step is not None:
            if not self._is_alone:
                self._copy(self._cache, 0, self._alone_cache, 0)
                self._is_alone = True
            return self._alone_step(tokens)
        self._leave_alone()
        if rows not in self._steps:
            self._steps[rows] = LayeredStep(
                self._model.config, self._model.weights, self._cache, rows
            )
        return self._steps[rows](tokens)

    def move(self, source: int, target: int, count: int) -> None:
        """As `RowPool.move`."""
        if target == 0:
            self._is_alone = False
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
        self._is_alone &= used > 0
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

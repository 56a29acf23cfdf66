"""The keys and values of every token so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from blip2.language.native.model import OPTModel


class KVCache:
    """Keys and values: layers x rows x heads x max_len x head_size.

    Rows are requests x beams, beams side by side. A row's tokens fill its slots from 0 on without
    gaps, whatever the other rows' lengths, so attention sees no padding: slot i is visible to a
    row of length n if i < n.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_size: int,
        prompt_lengths: torch.Tensor,
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        """Make an empty cache for prompts of these lengths (requests, on the cache's device)."""
        self._num_beams = num_beams
        self._shortest_prompt = int(prompt_lengths.min())
        # Slots in use in the longest row: known without asking the device.
        self._width = int(prompt_lengths.max())
        self.lengths = prompt_lengths.repeat_interleave(num_beams)
        self._rows = torch.arange(len(self.lengths), device=prompt_lengths.device)
        shape = (
            num_layers,
            len(self.lengths),
            num_heads,
            self._width + max_new_tokens,
            head_size,
        )
        self.keys = torch.zeros(shape, device=prompt_lengths.device)
        self.values = torch.zeros_like(self.keys)

    @classmethod
    def over(
        cls, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, width: int
    ) -> KVCache:
        """One of memory that is there, its rows not related, the longest `width` tokens long."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.lengths, cache._width = keys, values, lengths, width
        cache._rows = torch.arange(len(lengths), device=lengths.device)
        return cache

    def write_prompt(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the prompts' keys and values, requests x heads x T x head_size, for every beam.

        What lies beyond a row's length is padding; new tokens overwrite it before it is visible.
        """
        for cache, prompt in ((self.keys, keys), (self.values, values)):
            beams = cache[layer].unflatten(0, (-1, self._num_beams))
            beams[:, :, :, : prompt.shape[2]] = prompt[:, None]

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token's keys and values, rows x heads x head_size, behind each row.

        Returns this layer's keys and values so far: rows x heads x width x head_size.
        """
        self.keys[layer][self._rows, :, self.lengths] = keys
        self.values[layer][self._rows, :, self.lengths] = values
        width = self._width + 1
        return self.keys[layer, :, :, :width], self.values[layer, :, :, :width]

    def visible(self) -> torch.Tensor:
        """Which slots each row's new token attends to, itself included: rows x 1 x 1 x width."""
        slots = torch.arange(self._width + 1, device=self.lengths.device)
        return (slots <= self.lengths[:, None])[:, None, None]

    def advance(self) -> None:
        """Count the token that `append` stored in every layer."""
        self.lengths += 1
        self._width += 1

    def reorder(self, source_rows: torch.Tensor) -> None:
        """Let each row continue another row of the same request.

        Only the answers move: a request's beams share their prompt.
        """
        answers = slice(self._shortest_prompt, self._width)
        for cache in (self.keys, self.values):
            cache[:, :, :, answers] = cache[:, :, :, answers].index_select(1, source_rows)


class RowPool:
    """A cache whose rows requests take and leave; the rows in use come first."""

    def __init__(self, model: OPTModel, capacity: int, max_len: int, device: torch.device) -> None:
        """Make it empty, for so many rows of so many tokens."""
        config = model.config
        heads = config.num_attention_heads
        shape = (config.num_hidden_layers, capacity, heads, max_len, config.hidden_size // heads)
        self._model = model
        self._keys = torch.zeros(shape, dtype=model.weights.positions.dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._lengths = torch.zeros(capacity, dtype=torch.int64, device=device)

    def read(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        rows: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Read prompts, as `OPTModel.prefill`, prompt i into the rows (first, count)[i].

        Returns logits, B x vocab_size.
        """
        prompts = self._model.new_cache(lengths, 1, 0)
        logits = self._model.prefill(input_ids, lengths, tables, prompts)
        for prompt, (first, count) in enumerate(rows):
            taken = slice(first, first + count)
            self._lengths[taken] = lengths[prompt]
            for pool, read in ((self._keys, prompts.keys), (self._values, prompts.values)):
                pool[:, taken, :, : read.shape[3]] = read[:, prompt, None]
        return logits

    def step(self, tokens: torch.Tensor, used: int) -> torch.Tensor:
        """Append a token to each of the first rows; logits, of those in use at least."""
        rows = slice(0, used)
        lengths = self._lengths[rows]
        width = int(lengths.max())  # on a CPU this waits for nothing
        view = KVCache.over(self._keys[:, rows], self._values[:, rows], lengths, width)
        return self._model.step(tokens[rows], view)

    def move_rows(self, pairs: torch.Tensor) -> None:
        """Let rows become copies of others, pairs 2 x n: from, to. No row is both."""
        sources, targets = pairs
        for tensor in (self._keys, self._values):
            tensor[:, targets] = tensor[:, sources]
        self._lengths[targets] = self._lengths[sources]

    def move(self, source: int, target: int, count: int) -> None:
        """Let a request's rows, side by side, lie further in front."""
        for tensor in (self._keys, self._values):
            for offset in range(count):
                tensor[:, target + offset] = tensor[:, source + offset]
        self._lengths[target : target + count] = self._lengths[source : source + count].clone()

    def forget(self, used: int) -> None:
        """From `used` on rows are free."""
        self._lengths[used:] = 0

    def reorder(self, first: int, count: int, source_rows: torch.Tensor) -> None:
        """Let each of a request's rows continue another one of them, counted from its first."""
        rows = slice(first, first + count)
        for tensor in (self._keys, self._values):
            tensor[:, rows] = tensor[:, rows].index_select(1, source_rows)

"""The keys and values of every token so far, in memory that is allocated once."""

from __future__ import annotations

import torch


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
        self._keys = torch.zeros(shape, device=prompt_lengths.device)
        self._values = torch.zeros_like(self._keys)

    def write_prompt(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the prompts' keys and values, requests x heads x T x head_size, for every beam.

        What lies beyond a row's length is padding; new tokens overwrite it before it is visible.
        """
        for cache, prompt in ((self._keys, keys), (self._values, values)):
            beams = cache[layer].unflatten(0, (-1, self._num_beams))
            beams[:, :, :, : prompt.shape[2]] = prompt[:, None]

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token's keys and values, rows x heads x head_size, behind each row.

        Returns this layer's keys and values so far: rows x heads x width x head_size.
        """
        self._keys[layer][self._rows, :, self.lengths] = keys
        self._values[layer][self._rows, :, self.lengths] = values
        width = self._width + 1
        return self._keys[layer, :, :, :width], self._values[layer, :, :, :width]

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
        for cache in (self._keys, self._values):
            cache[:, :, :, answers] = cache[:, :, :, answers].index_select(1, source_rows)

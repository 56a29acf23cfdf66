"""attention.cu, a new token's attention over its cache, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from exact import HALF, bits_of, drawing, relative_error, settle

from blip2.gpu import compiled
from blip2.language.native.layered_step import ATTENTION_SOURCE

HEADS, MAX_LEN = 3, 700
HEAD_SIZES = (8, 48, 64, 80, 120, 128, 256)


def lengths_around(turn: int) -> list[int]:
    """One slot, fewer than a turn, a turn and one more or less, and several."""
    near = [turn * n + more for n in (1, 2) for more in (-1, 0, 1)]
    return sorted({1, 2, turn // 2, *(n for n in near if n < MAX_LEN), 300, MAX_LEN - 1})


class Case:
    """Rows of several lengths, each with slots in other rows' cache; what no row may see is NaN."""

    def __init__(self, device: torch.device, head_size: int, warps: int) -> None:
        # A warp attends to so many slots at a time, six times before it multiplies.
        turn = warps * 6 * (32 // (head_size // 8))
        lengths = torch.tensor(lengths_around(turn), device=device)
        rows, slots = len(lengths), torch.arange(MAX_LEN, device=device)
        generator = torch.Generator(device).manual_seed(head_size)
        draw = drawing(device, head_size)
        # A slot may lie in any row that had read so much before.
        there = slots < lengths[:, None]
        ranks = torch.rand(rows, rows, MAX_LEN, generator=generator, device=device)
        self.sources = ranks.where(there[None], -1).argmax(1).int()
        seen = torch.zeros(rows, MAX_LEN, dtype=torch.bool, device=device)
        for row, length in enumerate(lengths.tolist()):
            seen[self.sources[row, :length].long(), slots[:length]] = True
        self.lengths, self.rows, self.slots = lengths, rows, slots
        self.qkv = draw(rows, 3 * HEADS * head_size, spread=1.4)
        self.keys, self.values = (
            draw(rows, HEADS, MAX_LEN, head_size, spread=1.4).where(
                seen[:, None, :, None], math.nan
            )
            for _ in range(2)
        )
        self.attended = torch.full((rows, HEADS * head_size), math.nan, device=device).half()
        self.head_size, self.warps = head_size, warps

    def run(self) -> None:
        settle()
        macros = (("HEAD_SIZE", self.head_size), ("WARPS", self.warps))
        compiled.load_kernel(ATTENTION_SOURCE, "attention", macros)(
            (HEADS, self.rows),
            32 * self.warps,
            self.qkv,
            self.keys,
            self.values,
            self.lengths,
            self.sources,
            self.attended,
            MAX_LEN,
            self.head_size**-0.5,
        )

    def truth(self, row: int) -> torch.Tensor:
        """heads x D, from the cache as it was before."""
        length = int(self.lengths[row])
        query, key, value = self.qkv[row].double().unflatten(0, (3, HEADS, -1))
        sources, slots = self.sources[row, :length].long(), self.slots[:length]
        keys, values = (
            torch.cat((cache[sources, :, slots].double(), new[None]))
            for cache, new in ((self.keys, key), (self.values, value))
        )
        scores = torch.einsum("hd,lhd->hl", query, keys) * self.head_size**-0.5
        return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_attention_equals_float64(device, head_size, warps):
    """What every row attends to, what is written to the cache, and nothing else there."""
    case = Case(device, head_size, warps)
    truths = torch.stack([case.truth(row) for row in range(case.rows)])
    own = case.qkv.unflatten(1, (3, HEADS, -1)).unbind(1)[1:]
    expected = []
    for cache, new in zip((case.keys, case.values), own, strict=True):
        cache = cache.clone()
        cache[torch.arange(case.rows, device=device), :, case.lengths] = new
        expected.append(cache)
    case.run()
    found = case.attended.unflatten(1, (HEADS, -1))
    for row in range(case.rows):
        assert relative_error(found[row], truths[row]) < 1.5 * HALF, int(case.lengths[row])
    for cache, wanted in zip((case.keys, case.values), expected, strict=True):
        assert torch.equal(bits_of(cache), bits_of(wanted))
    first = case.attended.clone()
    case.run()
    assert torch.equal(case.attended, first)

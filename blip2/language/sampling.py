"""Tokens drawn from scores as transformers draws them, from numbers that a seed gives everywhere."""

from __future__ import annotations

import hashlib

import torch

from blip2.language.session import GenerationOptions


def sampling_settings(options: GenerationOptions, vocab_size: int) -> tuple[float, ...]:
    """What `draw_tokens` has to know of a row: temperature, 1 - top_p, repetition penalty, top_k."""
    top_k = options.top_k or vocab_size
    return options.temperature, 1 - options.top_p, options.repetition_penalty, top_k


def draw_tokens(scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """A token for each row.

    Args:
        scores: rows x vocab_size, float32, penalties applied.
        settings: rows x 4, float64: see `sampling_settings`.
        drawn: a number in [0, 1) for each row, float64.
    """
    kept = filtered(scores, settings)
    # float64: over a vocabulary of 50,000, float32 sums would shift the tokens' boundaries.
    cumulative = kept.softmax(dim=-1).double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # A number that was rounded to 1 draws the last token that is left.
    target = torch.minimum(drawn[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return chosen.clamp(max=cumulative.shape[1] - 1)  # NaN in the scores is behind all


def filtered(scores: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """Scores by transformers' filters, in its order: scaled, and -inf of what is dropped.

    Arguments are those of `draw_tokens`.
    """
    temperature, rest, _, top_k = settings.unbind(1)
    temperature, top_k, rest = temperature.float(), top_k.long(), rest.float()
    ascending, order = (scores / temperature[:, None]).sort(dim=-1)
    smallest = (scores.shape[1] - top_k).clamp(min=0)
    smallest_kept = ascending.gather(1, smallest[:, None])
    ascending = ascending.masked_fill(ascending < smallest_kept, -torch.inf)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= rest[:, None]
    dropped[:, -1] = False
    ascending = ascending.masked_fill(dropped, -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ascending)


def uniforms(seed: int, request: int, steps: int, sequence: int = 0) -> torch.Tensor:
    """`steps` numbers in [0, 1), float64, the same for the same arguments everywhere.

    `sequence` counts the answers to one request: the first is that of a request which has no other.
    """
    name = f"{seed} {request} {sequence}" if sequence else f"{seed} {request}"
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.rand(steps, dtype=torch.float64, generator=generator)

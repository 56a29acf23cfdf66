"""draw.cu, a sampled token without a sort, against the filters and the draw in float64."""

from __future__ import annotations

import math

import pytest
import torch
from exact import fill_free_memory_with_nan

from blip2.language.native.drawing import draw_tokens

VOCABULARIES = (7, 1000, 1024, 1025, 50272, 130_001)
# Temperature, top_k (0 is all) and top_p.
WAYS = (
    (1.0, 0, 1.0),
    (0.7, 50, 1.0),
    (1.8, 0, 0.9),
    (2.5, 40, 0.6),
    (5.0, 0, 0.999),
    (1.0, 1, 1.0),
)


def truth(scores: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """What is left of the distribution, as sorted numbers would say it, in float64."""
    scaled = scores.double() / temperature
    order = scaled.argsort(descending=True, stable=True)
    kept = torch.zeros_like(scaled, dtype=torch.bool)
    kept[order[: top_k or len(order)]] = True
    probabilities = scaled.masked_fill(~kept, -math.inf).softmax(0)
    before = probabilities[order].cumsum(0) - probabilities[order]  # of what is likelier
    dropped = order[before >= top_p]
    probabilities[dropped] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_tokens_are_those_of_float64(device, vocab_size, spread):
    """But where the number falls within rounding of the boundary between two tokens."""
    generator = torch.Generator(device).manual_seed(vocab_size)
    rows = 4 * len(WAYS)
    ways = [WAYS[row % len(WAYS)] for row in range(rows)]
    scores = torch.randn(rows, vocab_size, generator=generator, device=device) * spread
    drawn = torch.rand(rows, generator=generator, dtype=torch.float64, device=device)
    drawn[:2] = torch.tensor([0.0, 1.0], device=device)  # the second was rounded to that
    settings = [(heat, 1 - top_p, 1.0, top_k or vocab_size) for heat, top_k, top_p in ways]
    settings = torch.tensor(settings, dtype=torch.float64, device=device)
    fill_free_memory_with_nan(device)
    tokens = draw_tokens(scores, settings, drawn)
    assert torch.equal(draw_tokens(scores, settings, drawn), tokens)
    for row, (token, way) in enumerate(zip(tokens.tolist(), ways, strict=True)):
        probabilities = truth(scores[row], *way)
        ends = probabilities.cumsum(0)
        number = float(drawn[row])
        assert float(ends[token]) > number - 1e-5, (row, way)
        assert float(ends[token] - probabilities[token]) <= number + 1e-5, (row, way)
        assert probabilities[token] > 0, (row, way)


def test_every_token_that_is_left_is_drawn_as_often_as_it_should(device):
    vocab_size, draws = 50272, 20_000
    scores = torch.full((1, vocab_size), -20.0, device=device)
    likely = torch.tensor([3, 1023, 1024, 31_999, 50_271], device=device)
    scores[0, likely] = torch.tensor([3.0, 2.0, 2.5, 1.0, 2.8], device=device)
    drawn = torch.linspace(0, 1, draws + 1, dtype=torch.float64, device=device)[:-1]
    for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.9)):
        settings = torch.tensor(
            [[1.0, 1 - top_p, 1.0, top_k or vocab_size]], dtype=torch.float64, device=device
        )
        tokens = draw_tokens(
            scores.expand(draws, -1).contiguous(), settings.repeat(draws, 1), drawn
        )
        found = torch.bincount(tokens, minlength=vocab_size).double() / draws
        expected = truth(scores[0], 1.0, top_k, top_p)
        assert (found - expected).abs().max() < 2 / draws + 1e-6


def test_equal_scores_stay_or_go_together(device):
    scores = torch.zeros(1, 3000, device=device)
    scores[0, 1000:] = -50
    settings = torch.tensor([[1.0, 0.5, 1.0, 10]], dtype=torch.float64, device=device)
    numbers = torch.linspace(0, 0.9999, 1000, dtype=torch.float64, device=device)
    tokens = draw_tokens(scores.expand(1000, -1).contiguous(), settings.repeat(1000, 1), numbers)
    assert sorted(set(tokens.tolist())) == list(range(1000))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_yields_some_token(device, bad):
    scores = torch.randn(3, 50272, device=device)
    scores[1, 77] = bad
    settings = torch.tensor([[1.0, 0.1, 1.0, 50.0]], dtype=torch.float64, device=device)
    drawn = torch.full((3,), 0.5, dtype=torch.float64, device=device)
    tokens = draw_tokens(scores, settings.repeat(3, 1), drawn)
    assert ((tokens >= 0) & (tokens < 50272)).all()
    alone = draw_tokens(scores[[0, 2]], settings.repeat(2, 1), drawn[:2])
    assert tokens[[0, 2]].tolist() == alone.tolist()

"""Log probabilities of the tokens that a GPU chooses, against float64; and stops, holds and draws."""

from __future__ import annotations

import pytest
import torch

from blip2.language import GenerationOptions
from blip2.language.decoding import Greedy
from blip2.language.native.cuda_decoding import CudaGreedy, log_probs

VOCAB_SIZE = 50304
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_log_probabilities_are_the_softmaxs(rows, spread):
    generator = torch.Generator().manual_seed(rows)
    logits = spread * torch.randn(rows, VOCAB_SIZE, generator=generator)
    logits[0, 100:20000] = -torch.inf
    tokens = torch.randint(20000, VOCAB_SIZE, (rows,), generator=generator)
    found = log_probs(logits.to(DEVICE), tokens.to(DEVICE))
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=2e-5)


def test_greedy_searchs_kernel_adds_them_up():
    options = GenerationOptions(end_id=7, max_output_len=9)
    texts = [torch.tensor([3])] * 6
    fast = CudaGreedy(options, texts, VOCAB_SIZE, DEVICE)
    plain = Greedy(options, texts, VOCAB_SIZE, "cpu")
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        logits = 3 * torch.randn(6, VOCAB_SIZE, generator=generator)
        logits[step % 6, 7] += 20
        assert torch.equal(fast.advance(logits.to(DEVICE))[0].cpu(), plain.advance(logits)[0])
    found, expected = ([g.beams[0] for g in each.results()] for each in (fast, plain))
    assert [beam.token_ids for beam in found] == [beam.token_ids for beam in expected]
    assert len({len(beam.token_ids) for beam in found}) == 6
    scores = [beam.log_prob for beam in expected]
    assert [beam.log_prob for beam in found] == pytest.approx(scores, abs=2e-5)

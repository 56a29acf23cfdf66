"""The choices made from given logits, against transformers' own processors and statistics."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip2.language import GenerationOptions, decoding, sampling

VOCAB = 50
NO_TEXT = torch.tensor([VOCAB])  # one image row


def probabilities(options: GenerationOptions, scores: torch.Tensor) -> torch.Tensor:
    settings = torch.tensor([sampling.sampling_settings(options, VOCAB)], dtype=torch.float64)
    return sampling.filtered(scores, settings.repeat(len(scores), 1)).softmax(-1)


def make(options: GenerationOptions, requests: int = 1, first_request: int = 0):
    return decoding.make_strategy(options, [NO_TEXT] * requests, VOCAB, first_request)


def run(strategy, logits_of_step, steps: int):
    for step in range(steps):
        strategy.advance(logits_of_step(step))
    return strategy.results()


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("top_k", [0, 2, 7, 49, 50, 900])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    scores = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(top_k)) * 3
    options = GenerationOptions(end_id=0, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = probabilities(options, scores)
    assert torch.equal(ours, expected.softmax(-1))
    if 1 < top_k < VOCAB or top_p < 0.9:
        assert (ours == 0).any()


def test_top_k_keeps_ties_as_transformers_does():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0] + [-9.0] * (VOCAB - 5)])
    options = GenerationOptions(end_id=0, top_k=2)
    assert (probabilities(options, scores) > 0).sum() == 4


@pytest.mark.parametrize("penalty", [0.5, 1.5, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    texts = [torch.tensor([3, 7, 7, 2]), torch.tensor([1])]
    images = torch.tensor([VOCAB, VOCAB + 1])
    options = GenerationOptions(end_id=0, repetition_penalty=penalty)
    ours = decoding.RepetitionPenalty(
        options, [torch.cat((images, text)) for text in texts], VOCAB, "cpu"
    )
    scores = torch.randn(2, VOCAB) * 4
    reference = RepetitionPenaltyLogitsProcessor(penalty)
    for added in ([], [9], [9, 9, 30]):
        seen = [torch.cat((text, torch.tensor(added, dtype=torch.int64))) for text in texts]
        expected = [reference(ids[None], row[None])[0] for ids, row in zip(seen, scores)]  # noqa: B905
        for token in added:
            ours.add(torch.tensor([token, token]))
        assert torch.equal(ours.apply(scores), torch.stack(expected))
    assert not torch.equal(ours.apply(scores), scores)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.9)])
def test_samples_follow_the_distribution(top_k, top_p):
    requests, steps = 2000, 10
    draws = requests * steps
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    options = GenerationOptions(
        end_id=-1, top_k=top_k, top_p=top_p, temperature=1.3, max_output_len=steps
    )
    strategy = make(options, requests)
    results = run(strategy, lambda _: logits.expand(requests, -1), steps)
    drawn = torch.tensor([generation.beams[0].token_ids for generation in results])
    counts = torch.bincount(drawn.flatten(), minlength=VOCAB)
    expected = probabilities(options, logits)[0] * draws
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[likely].sum()
    # Chi-squared: mean n, standard deviation sqrt(2 n); five of them is one in millions.
    degrees = int(likely.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_number_that_was_rounded_to_one_draws_a_token_that_is_left():
    scores = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0))
    options = GenerationOptions(end_id=0, top_k=3)
    settings = torch.tensor([sampling.sampling_settings(options, VOCAB)], dtype=torch.float64)
    drawn = torch.ones(64, dtype=torch.float64)
    tokens = sampling.draw_tokens(scores, settings.repeat(64, 1), drawn)
    assert (probabilities(options, scores).gather(1, tokens[:, None]) > 0).all()


def test_samples_depend_on_seed_and_request_only():
    logits = torch.randn(1, VOCAB)
    options = GenerationOptions(end_id=-1, top_k=0, max_output_len=20, seed=5)

    def answers(requests, first_request=0, options=options):
        strategy = make(options, requests, first_request)
        results = run(strategy, lambda _: logits.expand(requests, -1), 20)
        return [generation.beams[0].token_ids for generation in results]

    together = answers(4)
    assert together == [answers(1, index)[0] for index in range(4)]
    assert together == answers(4)
    assert len({tuple(ids) for ids in together}) == 4
    other_seed = GenerationOptions(end_id=-1, top_k=0, max_output_len=20, seed=6)
    assert answers(1, options=other_seed)[0] not in together


def test_tokens_of_probability_zero_are_never_drawn():
    """Not even by the number 0, at which the cumulative distribution of token 0 starts."""
    logits = torch.tensor([[-torch.inf] * 7 + [0.0] * (VOCAB - 7)])
    strategy = make(GenerationOptions(end_id=-1, top_k=0, max_output_len=1))
    strategy._uniforms.zero_()
    assert strategy.advance(logits)[0].tolist() == [7]


def test_greedy_takes_the_largest_and_stops_at_the_end():
    steps = torch.full((4, 2, VOCAB), 0.0)
    for step, tokens in enumerate([(7, 8), (9, 3), (9, 4), (5, 9)]):
        for row, token in enumerate(tokens):
            steps[step, row, token] = 1
    strategy = make(GenerationOptions(end_id=9, pad_id=1, max_output_len=4), requests=2)
    fed = [strategy.advance(steps[0])[0]]
    assert not strategy.ended().all()
    fed += [strategy.advance(logits)[0] for logits in steps[1:]]
    assert strategy.ended().all()
    assert [ids.tolist() for ids in fed] == [[7, 8], [9, 3], [1, 4], [1, 9]]
    answers = [generation.beams[0] for generation in strategy.results()]
    assert [beam.token_ids for beam in answers] == [[7], [8, 3, 4]]
    assert answers[0].score is None


@pytest.mark.parametrize("early_stopping", [False, True])
def test_steps_after_the_end_change_nothing(early_stopping):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(40, 3 * 4, VOCAB, generator=generator) * 3
    steps[:, :, 9] += 5
    options = GenerationOptions(
        end_id=9, num_beams=4, max_output_len=40, early_stopping=early_stopping
    )
    strategy = make(options, requests=3)
    finished_at = None
    for step, logits in enumerate(steps[:-1]):
        strategy.advance(logits)
        if strategy.ended().all() and finished_at is None:
            finished_at, results = step, strategy.results()
    assert finished_at is not None
    assert finished_at < 30
    assert strategy.ended().all()
    assert strategy.results() == results


def test_advance_never_replaces_its_state():
    """A captured graph updates the tensors that it was captured with."""
    options = GenerationOptions(
        end_id=9, num_beams=3, max_output_len=5, repetition_penalty=1.2, early_stopping=True
    )
    for options_of_kind in (options, GenerationOptions(end_id=9, top_k=3, repetition_penalty=1.2)):
        strategy = make(options_of_kind, requests=2)
        state = vars(strategy) | vars(strategy._penalty)
        before = {name: value for name, value in state.items() if torch.is_tensor(value)}
        addresses = {name: value.data_ptr() for name, value in before.items()}
        for _ in range(3):
            strategy.advance(torch.randn(strategy.rows, VOCAB))
        after = vars(strategy) | vars(strategy._penalty)
        for name, address in addresses.items():
            assert after[name] is before[name], name
            assert after[name].data_ptr() == address, name


@pytest.mark.parametrize("length_penalty", [-400.0, 400.0])
def test_absurd_length_penalties_do_not_crash(length_penalty):
    options = GenerationOptions(
        end_id=9, num_beams=2, max_output_len=30, length_penalty=length_penalty
    )
    results = run(make(options), lambda _: torch.randn(2, VOCAB), 30)
    assert len(results[0].beams) == 2

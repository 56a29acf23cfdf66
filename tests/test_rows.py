"""Rows that requests take and leave: every answer is the one of a request alone, bit for bit or tie.

On the CPU's model, and on the GPU's over doubles of its kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import random

import pytest
import torch
from test_cuda_kernels import CONFIG, random_models

from blip2.language import Generation, GenerationOptions
from blip2.language.native import cuda_pool
from blip2.language.native.model import OPTModel
from blip2.language.native.session import NativeSession
from blip2.language.rows import BEAMS, NOT_FINITE, Admission, Chosen, News, Rows, prepared_rows

CPU = torch.device("cpu")
WIDTH = CONFIG.hidden_size


@pytest.fixture(params=["CPU", "GPU"])
def model(request) -> OPTModel:
    if request.param == "GPU":
        request.getfixturevalue("gpu_double")
    return random_models(None, seed=5)[request.param == "GPU"]


@torch.inference_mode()
def alone(model: OPTModel, admission: Admission) -> Generation:
    session = object.__new__(NativeSession)
    session._model, session.device = model, CPU
    [generation] = session._decode(
        [admission.input_ids], admission.table[None], admission.options, admission.number
    )
    return generation


def draw_admission(chance: random.Random, key: int) -> Admission:
    length, image_rows = chance.randrange(3, 12), 2
    ids = torch.tensor([chance.randrange(CONFIG.vocab_size) for _ in range(length)])
    ids[:image_rows] = CONFIG.vocab_size + torch.arange(image_rows)
    table = torch.randn(image_rows, WIDTH, generator=torch.Generator().manual_seed(key))
    kind = chance.randrange(7)
    how: dict = {"max_output_len": chance.randrange(1, 12), "seed": key}
    if kind == 1:
        how |= {"num_beams": chance.randrange(2, 5)}
    elif kind == 2:
        how |= {"top_k": 0, "temperature": 2.0, "top_p": 0.9}
    elif kind == 3:
        how |= {"repetition_penalty": 1.4}
    elif kind == 4:
        how |= {"top_k": 7, "temperature": 1.5, "repetition_penalty": 1.2}
    elif kind == 5:
        sequences = chance.randrange(2, 5)
        how |= {"top_k": 0, "repetition_penalty": 1.2, "num_return_sequences": sequences}
    elif kind == 6:
        how |= {"min_output_len": chance.randrange(1, 1 + how["max_output_len"])}
    return Admission(key, ids, table, GenerationOptions(end_id=3, **how), chance.randrange(3))


_SLOW = pytest.mark.slow  # in Triton's interpreter


@pytest.mark.parametrize(
    "seed, staged",
    [(0, 16), pytest.param(1, 16, marks=_SLOW), (2, 1), pytest.param(3, 2, marks=_SLOW)],
)
def test_answers_are_those_of_requests_alone(model, monkeypatch, seed, staged):
    """`staged`: with more prompts at once a GPU reads them where their rows are."""
    # The kernels' doubles are slow: with them the seeds of `make test-slow` alone go the whole way.
    wanted = 10 if type(model) is not OPTModel and seed in (0, 2) else 40
    monkeypatch.setattr(cuda_pool, "_STAGED", staged)
    chance = random.Random(seed)
    rows = Rows(model, CPU, 9, 40, 12)
    expected: dict[int, Generation] = {}
    running: dict[int, tuple[Admission, list[News]]] = {}
    scheduled: collections.Counter[int] = collections.Counter()
    key = checked = 0
    while checked < wanted:
        free = rows.capacity - rows.used
        batch = []
        for _ in range(chance.randrange(4)):
            admission = draw_admission(chance, key)
            if admission.options.rows > free:
                break
            free -= admission.options.rows
            key += 1
            assert rows.fits(len(admission.input_ids), admission.options.max_output_len)
            expected[admission.key] = alone(model, admission)
            running[admission.key] = (admission, [])
            batch.append(admission)
        news = []
        for advance in ([lambda: rows.admit(batch)] if batch else []) + [rows.step]:  # noqa: B023
            if advance == rows.step and not rows.used:
                continue
            chosen = advance()
            news.append(chosen)
            for name in chosen.keys:  # as an engine: nobody steps beyond max_output_len
                scheduled[name] += 1
                if name in running and scheduled[name] == running[name][0].options.max_output_len:
                    rows.release([name])
        for chosen in news:
            for told in chosen.read():
                name = told.key
                if name not in running:
                    continue
                admission, so_far = running[name]
                so_far.append(told)
                options, truth = admission.options, expected[name].beams
                is_last = len(so_far) == options.max_output_len
                if told.tokens == [BEAMS]:
                    if not told.has_ended and not is_last:
                        continue
                    found = chosen.result(name).beams
                    assert [beam.token_ids for beam in found] == [b.token_ids for b in truth]
                    scores = [beam.score for beam in found]
                    assert scores == pytest.approx([b.score for b in truth], abs=1e-3)
                else:
                    answers = [list(ids) for ids in zip(*(one.tokens for one in so_far))]  # noqa: B905
                    if not is_last and not all(3 in ids for ids in answers):
                        continue
                    log_probs = zip(*(one.log_probs for one in so_far))  # noqa: B905
                    for ids, chances, beam in zip(answers, log_probs, truth, strict=True):
                        length = ids.index(3) + 1 if 3 in ids else len(ids)
                        assert ids[: length - (3 in ids)] == beam.token_ids
                        mean = sum(chances[:length]) / length
                        assert mean == pytest.approx(beam.log_prob, abs=1e-3)
                rows.release([name])
                del running[name]
                checked += 1
        if running and chance.random() < 0.1:  # somebody leaves in the middle
            rows.release([name := chance.choice(list(running))])
            del running[name]
    for name in list(running):
        rows.release([name])
    assert rows.used == 0


def test_a_row_that_is_not_finite_is_that_requests(model):
    rows = Rows(model, CPU, 4, 40, 8)
    chance = random.Random(1)
    good = draw_admission(chance, 0)
    bad = Admission(1, good.input_ids, torch.full_like(good.table, torch.nan), good.options)
    rows.admit([good, bad])
    told = {news.key: news.tokens for news in rows.step().read()}
    assert told[1] == [NOT_FINITE]
    assert told[0] != [NOT_FINITE]


def test_one_that_is_alone_leaves_the_kernel_for_one_and_comes_back(gpu_double):  # noqa: ARG001
    config = dataclasses.replace(CONFIG, hidden_size=512, num_attention_heads=8, vocab_size=96)
    _, model = random_models(None, seed=2, config=config)
    rows = Rows(model, CPU, 4, 40, 12)
    assert rows._pool._alone_step is not None
    chance = random.Random(3)
    options = GenerationOptions(end_id=-1, max_output_len=11)
    drawn = [draw_admission(chance, key) for key in range(3)]
    tables = [torch.randn(2, 512, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    asked = [
        dataclasses.replace(one, table=table, options=options)
        for one, table in zip(drawn, tables, strict=True)
    ]
    told: dict[object, list[int]] = {0: [], 1: [], 2: []}

    def take(chosen: Chosen) -> None:
        for news in chosen.read():
            told[news.key] += news.tokens

    take(rows.admit(asked[:1]))
    for _ in range(3):
        take(rows.step())
    take(rows.admit(asked[1:2]))  # joined, by one who stays behind alone
    for _ in range(2):
        take(rows.step())
    rows.release([0])
    for _ in range(3):
        take(rows.step())
    take(rows.admit(asked[2:]))
    for _ in range(2):
        take(rows.step())
    for key in told:
        [beam] = alone(model, asked[key]).beams
        assert told[key] == beam.token_ids[: len(told[key])]
    assert [len(ids) for ids in told.values()] == [6, 8, 3]


@pytest.mark.parametrize("rows, prepared", [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (64, 64)])
def test_steps_are_taken_for_few_numbers_of_rows(rows, prepared):
    assert prepared_rows(rows) == prepared

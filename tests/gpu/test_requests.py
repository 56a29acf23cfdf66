"""The engine on a GPU: requests of all kinds at once are answered as each would be alone."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from engine_runs import (  # noqa: F401 - fixtures among them
    OPTIONS,
    QUESTIONS,
    SteppedEngine,
    alone,
    finish,
    pipeline,
    submit,
    told,
    values,
)

from blip2 import memory
from blip2.gpu import cuda_graphs

ROWS = (1, 6, 24)


@pytest.mark.parametrize("rows", ROWS)
def test_answers_are_those_given_alone(pipeline, values, alone, rows):
    """But for ties: kernels of other numbers of rows round otherwise."""
    engine = SteppedEngine(pipeline, rows)
    chance = random.Random(rows)
    keys = [key for key in alone if pipeline.options(OPTIONS[key[2]]).rows <= rows]
    pictures = [engine.picture(picture) for picture in values]
    asked = []
    for _ in range(60):
        key = chance.choice(keys)
        asked.append((key, submit(engine, pipeline, pictures, key)))
        if chance.random() < 0.1:
            asked.pop()[1].cancel()
        for _ in range(chance.randrange(4)):
            engine.take_turn()
    finish(engine)
    equal = [told(request)[0][0] == alone[key][0][0] for key, request in asked]
    assert sum(equal) >= 0.9 * len(equal)
    assert engine._running.used == 0


def test_nothing_is_allocated_once_it_is_warm(pipeline, values):
    engine = SteppedEngine(pipeline, 8)
    options = pipeline.options({"max_output_len": 24})
    peaks = []
    for _ in range(4):
        pictures = [engine.picture(values[number % 3]) for number in range(12)]
        for picture in pictures:
            engine.submit(picture, QUESTIONS[1], options)
        finish(engine)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_reserved())
    assert peaks[-1] == peaks[-2]


def test_a_warm_engine_captures_and_allocates_nothing_more(pipeline, values):
    engine = SteppedEngine(pipeline, 24)
    options = pipeline.options({"max_output_len": 24})
    engine._running.warm_up(pipeline.encode([QUESTIONS[1]])[0], options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for count in (1, 5, 16, 24):
        pictures = [engine.picture(values[number % 3]) for number in range(count)]
        for length, picture in enumerate(pictures):
            shorter = pipeline.options({"max_output_len": 1 + length % 24})
            engine.submit(picture, QUESTIONS[1], shorter)
        with mock.patch.object(cuda_graphs, "capture", side_effect=AssertionError("captured")):
            finish(engine)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == before


def test_no_row_is_lost_in_a_hundred_thousand_events(pipeline, values, alone):
    """Arrivals, cancellations and ends at random; memory stays what it was half-way."""
    engine = SteppedEngine(pipeline, 64)
    chance = random.Random(3)
    pictures = [engine.picture(picture) for picture in values]
    short = {"max_output_len": 6, "min_output_len": 0}
    kinds = [pipeline.options(how | short) for how in OPTIONS]
    plain = pipeline.options({"max_output_len": 5})
    asked: list = []
    events, over, allocated = 0, 0, 0
    while events < 100_000:
        for _ in range(chance.randrange(24)):
            options = chance.choice(kinds) if chance.random() < 0.1 else plain
            asked.append(engine.submit(chance.choice(pictures), chance.choice(QUESTIONS), options))
            events += 1
        for request in asked:
            if chance.random() < 0.02:
                request.cancel()
                events += 1
        engine.take_turn()
        running = engine._running
        assert running.used <= running.rows.capacity
        ended = sum(request.is_over for request in asked)
        events, over = events + ended, over + ended
        asked = [request for request in asked if not request.is_over]
        if not allocated and events > 50_000:
            finish(engine)
            allocated = torch.cuda.memory_allocated()
    finish(engine)
    assert over > 30_000
    assert engine._running.used == 0
    assert torch.cuda.memory_allocated() <= allocated + (1 << 20)
    last = engine.submit(pictures[0], QUESTIONS[0], pipeline.options(OPTIONS[1]))
    finish(engine)
    assert told(last) == alone[0, 0, 1]


def test_rows_take_no_more_than_half_of_the_free_memory(pipeline, monkeypatch):
    language = pipeline.language
    config = language._model.config
    per_row = (
        2 * 2 * config.num_hidden_layers * config.hidden_size * 128
    )  # keys and values, float16
    for rows, expected in ((64, 64), (63, 32), (40, 32), (1, 1), (0, 1)):
        monkeypatch.setattr(memory, "free_gpu_bytes", lambda _, rows=rows: 2 * rows * per_row)
        opened = language.open_rows(64, 40, 20)
        assert opened.max_len == 128
        assert opened.capacity == expected
    monkeypatch.undo()
    free, total = torch.cuda.mem_get_info()
    assert free <= memory.free_gpu_bytes(language.device) <= total

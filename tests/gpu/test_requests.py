"""The engine on a GPU: requests of all kinds at once are answered as each would be alone."""

from __future__ import annotations

import random

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

ROWS = (1, 6, 24)


@pytest.mark.parametrize("rows", ROWS)
def test_answers_are_those_given_alone(pipeline, values, alone, rows):
    """But for ties: kernels of other numbers of rows round otherwise."""
    engine = SteppedEngine(pipeline, rows)
    chance = random.Random(rows)
    keys = [key for key in alone if OPTIONS[key[2]].get("num_beams", 1) <= rows]
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

"""What the tests of the engine share: requests of every kind, and an engine taken turn by turn."""

from __future__ import annotations

import pytest
import torch
from batch_runs import CHECKPOINT, scene

from blip2 import images
from blip2.engine import Engine
from blip2.engines import Places
from blip2.pipeline import Pipeline, Stopwatch, open_pipeline

QUESTIONS = ["", "Question: What colour is the circle? Answer:", "Question: how many? Answer:"]
# One of each kind, and of different lengths.
OPTIONS = [
    {"max_output_len": 30},
    {"max_output_len": 1},
    {"max_output_len": 9, "repetition_penalty": 1.5},
    {"max_output_len": 12, "temperature": 3.0, "seed": 1},
    {"max_output_len": 7, "top_k": 5, "temperature": 4.0, "seed": 2},
    {"max_output_len": 14, "top_p": 0.8, "temperature": 3.0, "repetition_penalty": 1.2, "seed": 3},
    {"max_output_len": 10, "num_beams": 3},
    {"max_output_len": 20, "num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    {"max_output_len": 6, "num_beams": 4, "repetition_penalty": 1.3},
    {"max_output_len": 30, "min_output_len": 27, "repetition_penalty": 1.1},
    {"max_output_len": 30, "stop": ["circle", "square,"]},
    {"max_output_len": 9, "top_p": 0.9, "temperature": 3.0, "num_return_sequences": 3, "seed": 4},
    {"max_output_len": 18, "num_beams": 3, "num_return_sequences": 2, "stop": "circle"},
]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return open_pipeline(Places.of(CHECKPOINT, CHECKPOINT))


@pytest.fixture(scope="module")
def values(pipeline) -> list[torch.Tensor]:
    preprocessing = pipeline.vision.preprocessing
    return [images.pixel_values(scene(number).image, preprocessing) for number in range(3)]


@pytest.fixture(scope="module")
def alone(pipeline, values) -> dict[tuple[int, int, int], list[tuple[str, float | None]]]:
    """What each request is answered without an engine, one after another."""
    found = {}
    for number, picture in enumerate(values):
        look = pipeline.look(picture[None], Stopwatch())
        for question, text in enumerate(QUESTIONS):
            for how, options in enumerate(OPTIONS):
                [beams] = pipeline.ask(look, [text], pipeline.options(options))
                found[number, question, how] = [(a.text, a.score, a.finished) for a in beams]
    return found


def submit(engine: Engine, pipeline: Pipeline, pictures: list, key: tuple[int, int, int]):
    number, question, how = key
    options = pipeline.options(OPTIONS[how])
    return engine.submit(pictures[number], QUESTIONS[question], options)


def told(request) -> list[tuple[str, float | None, bool]]:
    assert request._is_over.wait(60), "it does not end"
    return [(a.text, a.score, a.finished) for a in request.answers()]


def same(found: list, expected: list) -> bool:
    """Scores are sums over rows of another batch: the same but for the last digits."""
    return len(found) == len(expected) and all(
        one[0] == other[0]
        and one[2] == other[2]
        and (one[1] == other[1] or one[1] == pytest.approx(other[1], abs=1e-4))
        for one, other in zip(found, expected, strict=True)
    )


class SteppedEngine(Engine):
    """One without a thread, whose turns a test takes."""

    def _tell(self, add) -> None:
        add()

    def take_turn(self) -> None:
        self._waiting.extend(self._arrivals)
        self._arrivals.clear()
        self._turn()


def stepped(pipeline: Pipeline, rows: int) -> SteppedEngine:
    return SteppedEngine(pipeline, rows)


def finish(engine: SteppedEngine) -> None:
    """Let everything end, of which no answer is long."""
    for _ in range(2000):
        if not (engine._is_busy or engine._arrivals):
            return
        engine.take_turn()
    raise AssertionError("a request does not end")

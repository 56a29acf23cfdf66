"""Windows through the rows of OPT's cache: the answers of batches, in the same way each time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import pytest
import torch
from batch_runs import scene
from engine_runs import QUESTIONS, pipeline  # noqa: F401 - a fixture

from blip2 import images
from blip2.errors import Blip2Error
from blip2.language.rows import Rows
from blip2.many import answering
from blip2.many.answering import Window, answer_in_batches, answer_in_rows
from blip2.pipeline import Pipeline, Stopwatch

SIZE, PICTURES, BLOCK = 3, 26, 4  # of windows, of the input, and windows of a block
PROMPTS = QUESTIONS[:2]


@pytest.fixture(scope="module")
def pixel_values(pipeline) -> torch.Tensor:
    preprocessing = pipeline.vision.preprocessing
    pictures = [images.pixel_values(scene(n).image, preprocessing) for n in range(PICTURES)]
    return torch.stack(pictures)


@pytest.fixture(autouse=True)
def overlapping(monkeypatch):
    """As on a GPU: two windows have rows at once."""
    rows = property(lambda opened: 2 * opened.default_batch_size)
    monkeypatch.setattr(Pipeline, "default_rows", rows)
    monkeypatch.setattr(answering, "_BLOCK", BLOCK)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int]]:
    """What the rows do, and how many have a request then."""
    made: list[tuple[str, int]] = []
    admit, step = Rows.admit, Rows.step

    def noting_admit(rows: Rows, admissions):
        made.append(("admit", rows.used))
        return admit(rows, admissions)

    def noting_step(rows: Rows):
        made.append(("step", rows.used))
        return step(rows)

    monkeypatch.setattr(Rows, "admit", noting_admit)
    monkeypatch.setattr(Rows, "step", noting_step)
    return made


def windows(pixel_values: torch.Tensor, first: int = 0, late: float = 0) -> Iterable[Window]:
    """From window `first` on; of the third the middle picture could not be read, of the sixth none."""
    chance = random.Random(0)
    for number in range(first, -(-PICTURES // SIZE)):
        part = pixel_values[number * SIZE : (number + 1) * SIZE]
        size = len(part)
        if number == 2:
            part = part[[0, 2]]
        if number == 5:
            part = part[:0]
        time.sleep(late * chance.random())
        yield Window(number * SIZE, size, part)


def texts(asked) -> list[list[list[str]]]:
    return [[[beam.text for beam in beams] for beams in group] for group in asked]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_output_len": 5},
        {"temperature": 3.0, "top_p": 0.9, "seed": 5},
        {"repetition_penalty": 1.3},
    ],
)
def test_answers_are_those_of_batches(pipeline, pixel_values, how, calls):
    options, watch = pipeline.options(how), Stopwatch()
    arguments = (pipeline, windows(pixel_values), PROMPTS, options, SIZE, watch)
    found = [texts(asked) for asked in answer_in_rows(*arguments)]
    overlapped = [used for kind, used in calls if kind == "admit" and used]
    arguments = (pipeline, windows(pixel_values), PROMPTS, options, SIZE, watch)
    expected = [texts(asked) for asked in answer_in_batches(*arguments)]
    assert found == expected
    assert overlapped
    assert len({text for asked in found for group in asked for [text] in group}) > 10
    assert set(watch.seconds) == {"ViT", "Q-Former", "OPT"}


def test_a_run_that_goes_on_does_what_an_uninterrupted_one_does(pipeline, pixel_values, calls):
    """In the same order with the same rows in use, however late pictures come."""
    options = pipeline.options({})

    def run(first: int, late: float = 0) -> tuple[list, list]:
        calls.clear()
        arguments = (windows(pixel_values, first, late), PROMPTS, options, SIZE, Stopwatch())
        return [texts(asked) for asked in answer_in_rows(pipeline, *arguments)], list(calls)

    answers, whole = run(0)
    assert run(0, late=0.05) == (answers, whole)
    for block in (1, 2):
        some_answers, rest = run(block * BLOCK)
        assert some_answers == answers[block * BLOCK :]
        assert rest == whole[-len(rest) :]
        assert rest[0] == ("admit", 0)


def test_blocks_begin_anew_where_windows_overlap_and_nowhere_else(pipeline, monkeypatch):
    options = pipeline.options({})
    assert answering.block_of(pipeline, options) == BLOCK
    assert answering.block_of(pipeline, pipeline.options({"num_beams": 2})) == 1
    monkeypatch.setattr(Pipeline, "default_rows", Pipeline.default_batch_size)
    assert answering.block_of(pipeline, options) == 1


def test_fewer_rows_than_a_window_has_pictures_suffice(pipeline, pixel_values, monkeypatch, calls):
    options, watch = pipeline.options({}), Stopwatch()
    arguments = (windows(pixel_values), PROMPTS, options, SIZE, watch)
    expected = [texts(asked) for asked in answer_in_batches(pipeline, *arguments)]
    open_rows = type(pipeline.language).open_rows
    monkeypatch.setattr(
        type(pipeline.language),
        "open_rows",
        lambda session, _, *lengths: open_rows(session, 2, *lengths),
    )
    arguments = (windows(pixel_values), PROMPTS, options, SIZE, watch)
    assert [texts(asked) for asked in answer_in_rows(pipeline, *arguments)] == expected
    assert max(used for _, used in calls) == 2


def test_what_is_not_finite_is_named_and_what_was_before_it_is_there(pipeline, pixel_values):
    bad = pixel_values.clone()
    bad[SIZE * 7] = torch.nan
    arguments = (windows(bad), PROMPTS, pipeline.options({}), SIZE, Stopwatch())
    asked = answer_in_rows(pipeline, *arguments)
    for _ in range(7):
        next(asked)
    with pytest.raises(Blip2Error, match="the ViT yields NaN or Inf"):
        next(asked)

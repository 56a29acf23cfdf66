"""Many pictures through the pipeline: decoded ahead, each looked at once, every question asked of it.

Batches are windows of the input: batch k holds pictures k * size … (k + 1) * size - 1 of it, those
that cannot be read left out. So a run that goes on computes the batches that an uninterrupted one
would, and gives the same answers, sampled ones too.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from blip2 import inputs
from blip2.artifacts import UserError
from blip2.decoders import Decoders
from blip2.inputs import Picture
from blip2.journal import Journal
from blip2.language import GenerationOptions
from blip2.pipeline import Answer, Pipeline, Stopwatch


@dataclasses.dataclass(frozen=True)
class Question:
    """What a line of the output is asked, and the prompt that OPT reads for it."""

    text: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did: pictures in the output, those of this run, and its seconds by stage."""

    done: int
    failed: int
    new: int
    wall_seconds: float
    seconds: dict[str, float]

    def __str__(self) -> str:
        rate = self.new / self.wall_seconds if self.new else 0.0
        lines = [
            f"{self.done} pictures done, {self.failed} of them failed;"
            f" {self.new} in this run, {rate:.1f} pictures/s",
            f"{'stage':<18}{'time':>12}{'share':>8}",
        ]
        other = self.wall_seconds - sum(self.seconds.values())
        for stage, seconds in [*self.seconds.items(), ("other", other)]:
            lines.append(f"{stage:<18}{seconds:>10.1f} s{seconds / self.wall_seconds:>7.0%}")
        return "\n".join(lines)


def default_batch_size(pipeline: Pipeline) -> int:
    """64 on a GPU, 16 on a CPU, and no more than either engine takes at once."""
    limits = (pipeline.vision.max_batch_size, pipeline.language.limits.max_batch_size)
    wanted = 64 if pipeline.vision.device.type == "cuda" else 16
    return min([wanted, *(limit for limit in limits if limit)])


def describe(
    pipeline: Pipeline, questions: Sequence[Question], options: GenerationOptions, batch_size: int
) -> dict[str, Any]:
    """What must stay the same for a run to go on with the output of another, by flag."""
    return {
        "--input_text or --prompt_template": [dataclasses.asdict(q) for q in questions],
        "--batch_size": batch_size,
        **{f"--{name}": value for name, value in dataclasses.asdict(options).items()},
        "tokenizer": [pipeline.tokenizer.encode(question.prompt) for question in questions],
    }


def answer_all(
    pipeline: Pipeline,
    decoders: Decoders,
    entries: Sequence[str],
    questions: Sequence[Question],
    options: GenerationOptions,
    journal: Journal,
    batch_size: int,
) -> Summary:
    """Ask every question of every picture that is not in the journal yet, and write the answers.

    Args:
        entries: what `inputs.list_entries` found.
        options: how to decode; of a sampling, `seed` is the first of a series.
        batch_size: pictures looked at, and asked one question, at once.

    Raises:
        UserError: the input is another than that of the journal's pictures; the journal cannot be
            written; the engines cannot take a question. What was written before stays.
    """
    watch, start = Stopwatch(), time.perf_counter()
    position = journal.done // batch_size * batch_size
    done, failed = journal.done, journal.failed
    batches = decoders.decode(
        _open_batches(inputs.read_pictures(entries), journal, batch_size),
        pipeline.vision.preprocessing,
    )
    with _progress_bar(inputs.count_pictures(entries), journal.done) as bar:
        while True:
            with watch.time("wait for pictures"):
                pictures, decoded = next(batches, ((), []))
            if not pictures:
                break
            answers = _answer(pipeline, decoded, questions, options, position, watch)
            # Those before `new` were written by the run that this one goes on with.
            new = max(0, journal.done - position)
            lines = [
                _lines(picture, outcome, questions)
                for picture, outcome in zip(pictures[new:], answers[new:], strict=True)
            ]
            with watch.time("write"):
                journal.append(list(itertools.chain.from_iterable(lines)))
            position += len(pictures)
            done += len(lines)
            failed += sum(isinstance(outcome, str) for outcome in answers[new:])
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(len(lines))
    wall = time.perf_counter() - start
    return Summary(done, failed, done - journal.done, wall, watch.seconds)


def _progress_bar(total: int, done: int) -> tqdm:
    # In a log file every refresh is another line.
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, unit=" pictures", mininterval=interval, smoothing=0.1)


def _open_batches(
    pictures: Iterable[Picture], journal: Journal, size: int
) -> Iterator[list[Picture]]:
    """The batches that hold a picture which is not done, in order."""
    source, names, position = iter(pictures), journal.names(), 0
    while batch := list(itertools.islice(source, size)):
        for picture, name in zip(batch, names, strict=False):
            if picture.name != name:
                raise _changed_input(journal, name)
        position += len(batch)
        if position > journal.done:
            yield batch
    if missing := next(names, None):
        raise _changed_input(journal, missing)


def _changed_input(journal: Journal, name: dict[str, str]) -> UserError:
    return UserError(
        f"{journal.path} has an answer for {'/'.join(name.values())}, which is no longer there in"
        " the input's order; give the same pictures again, or choose another --output"
    )


def _answer(
    pipeline: Pipeline,
    decoded: Sequence[np.ndarray | str],
    questions: Sequence[Question],
    options: GenerationOptions,
    position: int,
    watch: Stopwatch,
) -> list[list[list[Answer]] | str]:
    """For each picture its answers, question by question, beams best first; or what is wrong."""
    values = [picture for picture in decoded if not isinstance(picture, str)]
    if not values:
        return list(decoded)
    look = pipeline.look(torch.from_numpy(np.stack(values)), watch)
    asked = []
    for number, question in enumerate(questions):
        # The seed counts requests over: equal draws in every batch would make them alike.
        seed = options.seed + position * len(questions) + number * len(decoded)
        with watch.time("OPT"):
            asked.append(
                pipeline.ask(
                    look,
                    [question.prompt] * len(values),
                    dataclasses.replace(options, seed=seed),
                )
            )
    of_picture = (list(answers) for answers in zip(*asked, strict=True))
    return [outcome if isinstance(outcome, str) else next(of_picture) for outcome in decoded]


def _lines(
    picture: Picture, outcome: list[list[Answer]] | str, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    if isinstance(outcome, str):
        return [{**picture.name, "error": outcome}]
    lines = []
    for question, beams in zip(questions, outcome, strict=True):
        answer = beams[0].text
        line = {**picture.name, "question": question.text, "answer": answer, "flags": flags(answer)}
        if len(beams) > 1:
            line["beams"] = [dataclasses.asdict(beam) for beam in beams]
        lines.append(line)
    return lines


def flags(answer: str) -> list[str]:
    """What is suspicious of an answer: "empty", or "loop" if it ends by repeating itself.

    A loop is the same words three times over at the end, wherever in them the answer was cut.
    """
    words = answer.split()
    if not words:
        return ["empty"]
    for period in range(1, len(words) // 3 + 1):
        tail = words[-3 * period :]
        if tail[period:] == tail[:-period]:
            return ["loop"]
    return []

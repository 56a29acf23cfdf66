"""The Python API on a GPU: streams, threads, and the device that is asked for."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from batch_runs import CHECKPOINT, scene

import blip2

QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def pictures():
    return [scene(number).image for number in range(4)]


@pytest.fixture(scope="module")
def told(pictures) -> list[str]:
    """What a CPU answers, in float32 products; tests/test_api.py compares that with transformers."""
    return [str(answer) for answer in blip2.load(CHECKPOINT, device="cpu").caption(pictures)]


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_answers_and_streams(pictures, told, precision):
    model = blip2.load(CHECKPOINT, precision=precision)
    assert model._pipeline.vision.device.type == "cuda"
    answers = [str(answer) for answer in model.caption(pictures)]
    assert (
        sum(one == other for one, other in zip(answers, told, strict=True)) >= 3
    )  # a tie may differ
    for picture in pictures:
        for _ in range(3):  # eager, captured, replayed
            assert "".join(model.stream(picture)) == str(model.caption(picture))


def test_streams_and_threads_do_not_meet(pictures):
    model = blip2.load(CHECKPOINT)
    told = [str(model.caption(picture)) for picture in pictures]
    texts = [""] * 4
    for pieces in itertools.zip_longest(*map(model.stream, pictures), fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == told
    found = {}

    def ask(number: int) -> None:
        found[number] = str(model.caption(pictures[number % 4]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(12)] == told * 3


def test_features_stay_when_others_are_looked_at(pictures):
    model = blip2.load(CHECKPOINT)
    first = model.features(pictures[0])
    kept = first.image_embeds.clone(), first.query_output.clone()
    for _ in range(3):
        model.features(pictures[1])
    assert torch.equal(first.image_embeds, kept[0])
    assert torch.equal(first.query_output, kept[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu(pictures):
    before = torch.cuda.memory_allocated(0)
    second = blip2.load(CHECKPOINT, device="cuda:1")
    for _ in range(3):
        answers = [str(answer) for answer in second.caption(pictures)]
    assert torch.cuda.memory_allocated(1) > 1 << 20
    assert torch.cuda.memory_allocated(0) <= before + (1 << 20)
    assert answers == [str(answer) for answer in blip2.load(CHECKPOINT).caption(pictures)]
    assert "".join(second.stream(pictures[0])) == answers[0]

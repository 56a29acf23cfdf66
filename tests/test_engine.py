"""The engine on a CPU: answers are those given alone, whatever else runs, and no row is lost."""

from __future__ import annotations

import gc
import random
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from batch_runs import scene
from engine_runs import (  # noqa: F401 - fixtures among them
    OPTIONS,
    SteppedEngine,
    alone,
    finish,
    pipeline,
    same,
    stepped,
    submit,
    told,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blip2
from blip2 import images
from blip2.engine import Engine, Load
from blip2.engine import engine as engine_module
from blip2.engine.lull import Lull
from blip2.errors import Blip2Error
from blip2.language import Beam, Generation
from blip2.language.decoding import BeamSearch
from blip2.language.native.session import NativeSession
from blip2.language.rows import BEAMS, News, Rows
from demo import scenes

requests = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, len(OPTIONS) - 1))
events = st.lists(
    st.tuples(requests, st.booleans(), st.integers(0, 3)), min_size=1, max_size=12
)  # what is asked, whether it is cancelled, turns before the next


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(events, st.sampled_from([4, 5, 16]))
def test_answers_are_those_given_alone(pipeline, values, alone, arrivals, rows):
    engine = stepped(pipeline, rows)
    pictures = [engine.picture(picture) for picture in values]
    asked = []
    for key, is_cancelled, turns in arrivals:
        request = submit(engine, pipeline, pictures, key)
        asked.append((request, key, is_cancelled))
        for _ in range(turns):
            engine.take_turn()
        if is_cancelled:
            request.cancel()
    finish(engine)
    for request, key, is_cancelled in asked:
        assert request.is_over
        if not is_cancelled:
            assert same(told(request), alone[key]), (key, told(request), alone[key])
    assert engine._running.used == 0
    assert not engine._is_busy


def test_rows_are_not_lost_in_a_hundred_thousand_events(pipeline, values):
    """Arrivals, cancellations and steps at random, of a session whose steps cost nothing."""
    chance = random.Random(7)
    engine = stepped(pipeline, 16)
    rows = FakeRows(16, chance)
    engine._running.rows = rows
    picture = engine.picture(values[0])
    picture.query_output = torch.zeros(16, pipeline.language.hidden_size)
    options = [pipeline.options(how) for how in OPTIONS]
    running, over, events = [], 0, 0
    while events < 100_000:
        what = chance.random()
        if what < 0.3 and len(running) < 40:
            running.append(engine.submit(picture, "", chance.choice(options)))
        elif what < 0.4 and running:
            chance.choice(running).cancel()
        else:
            engine.take_turn()
            rows.check()
            over += sum(request.is_over for request in running)
            running = [request for request in running if not request.is_over]
        events += 1
    for _ in range(5):  # which nobody cancels
        running += [engine.submit(picture, "", how) for how in options]
    finish(engine)
    assert over > 10_000
    assert rows.used == 0
    assert not engine._is_busy


class FakeRows:
    """Rows without a model: each request ends after some tokens of its own."""

    capacity = 16

    def __init__(self, capacity: int, chance: random.Random) -> None:
        self.capacity, self._chance = capacity, chance
        self._left: dict[object, list[int]] = {}

    @property
    def used(self) -> int:
        return sum(options.rows for options, _ in self._left.values())

    def fits(self, *_lengths) -> bool:
        return True

    def prepare(self, *_lengths) -> None:
        pass

    def check(self) -> None:
        assert self.used <= self.capacity

    def admit(self, admissions) -> FakeChosen:
        for admission in admissions:
            left = self._chance.randrange(1, 12)
            self._left[admission.key] = [admission.options, left]
        self.check()
        return self._choose([admission.key for admission in admissions])

    def step(self) -> FakeChosen:
        return self._choose(list(self._left))

    def _choose(self, keys) -> FakeChosen:
        for key in keys:
            self._left[key][1] -= 1
        return FakeChosen({key: tuple(self._left[key]) for key in keys})

    def release(self, keys) -> None:
        for key in keys:
            self._left.pop(key, None)


class FakeChosen:
    def __init__(self, left) -> None:
        self.keys, self.last, self._left = list(left), set(), left

    def wait(self):
        pass

    def read(self):
        for key, (how, left) in self._left.items():
            if how.num_beams > 1:
                yield News(key, [BEAMS], [], left == 0)
                continue
            token = how.end_id if left == 0 else 5
            yield News(key, [token] * how.rows, [-1.0] * how.rows, False)

    def result(self, _key):
        return Generation((Beam([5, 6], -0.5),))


@pytest.mark.parametrize("has_rows", [True, False])
def test_an_error_ends_its_request_alone(pipeline, values, alone, monkeypatch, has_rows):
    """A picture that yields NaN, beside others in the same look and the same steps."""
    if not has_rows:
        monkeypatch.setattr(NativeSession, "has_rows", False)
    engine = stepped(pipeline, 8)
    pictures = [engine.picture(picture) for picture in values]
    pictures[1] = engine.picture(torch.full_like(values[1], torch.nan))
    asked = {n: submit(engine, pipeline, pictures, (n, 0, 0)) for n in range(3)}
    finish(engine)
    for number in (0, 2):
        assert same(told(asked[number]), alone[number, 0, 0])
    with pytest.raises(Blip2Error, match="yields NaN or Inf"):
        told(asked[1])
    with pytest.raises(Blip2Error, match="yields NaN or Inf"):
        list(asked[1].tokens())
    assert engine._running.used == 0


def test_what_opt_makes_nan_of_ends_that_request(pipeline, values, alone):
    engine = stepped(pipeline, 8)
    pictures = [engine.picture(picture) for picture in values[:2]]
    asked = [submit(engine, pipeline, pictures, (n, 0, 0)) for n in range(2)]
    engine.take_turn()
    with torch.inference_mode():
        engine._running.rows._pool._keys[:, 1] = torch.nan
    finish(engine)
    assert same(told(asked[0]), alone[0, 0, 0])
    with pytest.raises(Blip2Error, match="the OPT yields NaN or Inf"):
        told(asked[1])


def test_beams_that_turn_out_not_to_be_finite_end_that_request(
    pipeline, values, alone, monkeypatch
):
    """In a step that was begun before their end was heard of."""

    def results(_strategy: BeamSearch) -> list[Generation]:
        raise FloatingPointError("logits are NaN or Inf")

    monkeypatch.setattr(BeamSearch, "results", results)
    engine = stepped(pipeline, 8)
    picture = engine.picture(values[0])
    asked = [
        submit(engine, pipeline, [picture], (0, 0, how)) for how in (0, 6)
    ]  # 6 has three beams
    finish(engine)
    assert same(told(asked[0]), alone[0, 0, 0])
    with pytest.raises(Blip2Error, match="the OPT yields NaN or Inf"):
        told(asked[1])
    assert engine._running.used == 0


def test_what_an_engine_cannot_take_is_refused_at_once(pipeline, values):
    engine = stepped(pipeline, 4)
    picture = engine.picture(values[0])
    for how, text, message in (
        ({"num_beams": 5}, "", "`num_beams` is 5, this engine has 4 rows"),
        ({"max_output_len": 100_000}, "", "takes at most"),
        ({}, "word " * 3000, "takes at most"),
    ):
        with pytest.raises(Blip2Error, match=message):
            engine.submit(picture, text, pipeline.options(how))
    assert not engine._arrivals


def test_a_failed_step_ends_what_had_rows_and_nothing_else(pipeline, values, alone, monkeypatch):
    engine = stepped(pipeline, 2)
    pictures = [engine.picture(picture) for picture in values]
    asked = [submit(engine, pipeline, pictures, (n, 0, 0)) for n in range(3)]
    engine.take_turn()
    with monkeypatch.context() as patch:
        patch.setattr(engine._running.rows._pool, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.take_turn()
    for request in asked[:2]:
        with pytest.raises(ZeroDivisionError):
            told(request)
    finish(engine)
    assert same(told(asked[2]), alone[2, 0, 0])


def test_prompts_that_memory_does_not_hold_together_are_read_apart(
    pipeline, values, alone, monkeypatch
):
    engine = stepped(pipeline, 8)
    pictures = [engine.picture(picture) for picture in values]
    asked = {key: submit(engine, pipeline, pictures, key) for key in list(alone)[::5]}
    sizes, admit = [], Rows.admit

    def limited(rows: Rows, admissions):
        sizes.append(len(admissions))
        if len(admissions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return admit(rows, admissions)

    monkeypatch.setattr(Rows, "admit", limited)
    finish(engine)
    assert max(sizes) > 2
    for key, request in asked.items():
        assert same(told(request), alone[key])


def test_no_two_requests_are_taken_for_one(pipeline, values, monkeypatch):
    """What an ended one still has under way is not the next one's, though that has its address."""
    engine = stepped(pipeline, 2)
    picture = engine.picture(values[0])
    keys, admit = [], Rows.admit

    def noting(rows: Rows, admissions):
        keys.extend(admission.key for admission in admissions)
        return admit(rows, admissions)

    monkeypatch.setattr(Rows, "admit", noting)
    for _ in range(50):
        engine.submit(picture, "", pipeline.options(OPTIONS[1]))  # which nobody keeps
        finish(engine)
    assert len(set(keys)) == 50


def test_rows_that_cannot_be_had_end_who_asks_and_nobody_else(pipeline, values, alone, monkeypatch):
    engine = stepped(pipeline, 4)
    pictures = [engine.picture(picture) for picture in values]
    open_rows = NativeSession.open_rows

    def without_memory(session, capacity, prompt_len, max_output_len):
        if max_output_len > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB.")
        return open_rows(session, capacity, prompt_len, max_output_len)

    monkeypatch.setattr(NativeSession, "open_rows", without_memory)
    long = engine.submit(pictures[0], "", pipeline.options({"max_output_len": 90}))
    short = submit(engine, pipeline, pictures, (1, 0, 0))
    finish(engine)
    with pytest.raises(Blip2Error, match="not enough GPU memory for this request; lower"):
        told(long)
    assert same(told(short), alone[1, 0, 0])


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Of the groups that are begun."""
    found, admit = [], Rows.admit

    def noting(rows: Rows, admissions):
        found.append(len(admissions))
        return admit(rows, admissions)

    monkeypatch.setattr(Rows, "admit", noting)
    return found


def test_nobody_is_begun_while_the_last_answers_are_still_to_be_handed_out(pipeline, values, sizes):
    """Who gets one may ask again, and is begun together with those that wait."""
    engine = stepped(pipeline, 8)
    options = pipeline.options({"max_output_len": 2})
    first = engine.submit(engine.picture(values[0]), "", options)
    engine.take_turn()
    assert not first.is_over
    waiting = [engine.submit(engine.picture(value), "", options) for value in values]
    engine.take_turn()
    assert first.is_over
    assert sizes == [1]
    waiting.append(engine.submit(engine.picture(values[0]), "", options))
    finish(engine)
    assert sizes == [1, 4]
    assert told(waiting[0]) == told(waiting[3]) == told(first)


def test_those_who_may_ask_again_are_waited_for(pipeline, values, sizes, monkeypatch):
    """Three answers end at once: of the three that follow none is begun before the last is there."""
    monkeypatch.setattr(engine_module, "_SILENCE", 20)
    monkeypatch.setattr(engine_module, "_AGAIN", 20)
    engine = Engine(pipeline, 8)
    options = pipeline.options({"max_output_len": 1})

    def ask_slowly() -> list:
        asked = []
        for value in values:
            asked.append(engine.submit(engine.picture(value), "", options))
            time.sleep(0.05)
        return asked

    is_held, gate = threading.Event(), threading.Event()
    caller = threading.Thread(target=engine.call, args=(lambda: is_held.set() or gate.wait(),))
    caller.start()
    is_held.wait()
    together = ask_slowly()
    gate.set()
    caller.join()
    answers = [told(request) for request in together]
    assert [told(request) for request in ask_slowly()] == answers
    engine.close()
    assert sizes == [3, 3]


@pytest.mark.parametrize(
    "used, waited, is_due",
    [
        (1, [0.006], False),
        (1, [0.008], True),  # it has waited for as long as the one under way is held up
        (10, [0.035], False),
        (10, [0.035, 0.034], False),
        (10, [0.036, 0.035], True),  # as long as ten are, all together
        (10, [0.059], False),
        (10, [0.061], True),  # long enough in any case
        (3, [0.0, 0.0], False),
        (3, [0.0] * 8, True),  # as many as are looked at together
    ],
)
def test_a_group_is_begun_when_its_wait_is_worth_its_price(pipeline, used, waited, is_due):
    """7 ms for each that is under way, and 60 ms at most."""
    engine = Engine(pipeline, 16)
    now = time.monotonic()

    def request(seconds: float) -> SimpleNamespace:
        return SimpleNamespace(options=SimpleNamespace(rows=1), arrived=now - seconds)

    rows = SimpleNamespace(capacity=16)
    engine._running = SimpleNamespace(rows=rows, used=used, free=16 - used)
    engine._waiting.extend(map(request, waited))
    with mock.patch.object(engine_module.time, "monotonic", return_value=now):
        assert engine._is_due() is is_due


def test_bytes_and_what_becomes_of_them_are_looked_at_together(pipeline, sizes):
    """Of pictures that are asked about at once some may be pixels, others normalised already."""
    preprocessing = pipeline.vision.preprocessing
    pixels = torch.from_numpy(images.resized_pixels(scene(7).image, preprocessing))
    floats = images.pixel_values(scene(7).image, preprocessing)
    engine = stepped(pipeline, 8)
    options = pipeline.options({"max_output_len": 30})
    asked = [engine.submit(engine.picture(picture), "", options) for picture in (pixels, floats)]
    finish(engine)
    assert sizes == [2]
    texts = [request.answers()[0].text for request in asked]
    assert texts == [scenes.caption(scene(7))] * 2


def test_a_lull_is_while_the_thread_waits():
    """And before it has begun; without a GPU, whose queue could run dry, always."""
    lull, none = Lull(is_used=True), Lull(is_used=False)
    found = []
    for one in (lull, none):
        found.append(one.wait(0))
        with one.during():
            found.append(one.wait(0))
        found.append(one.wait(0))
    assert found == [True, True, False, True, True, True]
    waiting = threading.Thread(target=lull.wait, args=(20,), daemon=True)
    waiting.start()
    with lull.during():
        waiting.join(10)
    assert not waiting.is_alive()


def test_beams_for_which_memory_has_no_rows_end_alone(pipeline, values, alone, monkeypatch):
    engine = stepped(pipeline, 4)
    pictures = [engine.picture(picture) for picture in values]
    open_rows = NativeSession.open_rows
    monkeypatch.setattr(
        NativeSession, "open_rows", lambda session, _, *lengths: open_rows(session, 2, *lengths)
    )
    asked = [submit(engine, pipeline, pictures, (n, 0, how)) for n, how in ((0, 6), (1, 0), (2, 7))]
    finish(engine)
    with pytest.raises(Blip2Error, match="`num_beams` is 3, this engine has 2 rows; lower it"):
        told(asked[0])
    assert same(told(asked[1]), alone[1, 0, 0])
    assert same(told(asked[2]), alone[2, 0, 7])


@pytest.mark.parametrize("place", ["read", "choose"])
def test_an_admission_that_fails_leaves_no_rows_behind(pipeline, values, alone, monkeypatch, place):
    monkeypatch.setattr(engine_module, "_PATIENCE", 0)
    engine = stepped(pipeline, 8)
    pictures = [engine.picture(picture) for picture in values]
    going_on = submit(engine, pipeline, pictures, (0, 0, 0))
    engine.take_turn()
    with monkeypatch.context() as patch:
        target = (
            (type(engine._running.rows._pool), "read") if place == "read" else (Rows, "_choose")
        )
        original = getattr(*target)

        def failing(*arguments):
            if place == "read" or arguments[2].start > 0:  # not a step
                raise RuntimeError("the first time")
            return original(*arguments)

        patch.setattr(*target, failing)
        failed = [submit(engine, pipeline, pictures, (n, 0, how)) for n, how in ((1, 6), (2, 0))]
        while not all(request.is_over for request in failed):
            engine.take_turn()
    for request in failed:
        with pytest.raises(RuntimeError, match="the first time"):
            told(request)
    again = submit(engine, pipeline, pictures, (2, 1, 6))
    finish(engine)
    assert same(told(going_on), alone[0, 0, 0])
    assert same(told(again), alone[2, 1, 6])
    assert engine._running.rows.used == 0


def test_longer_requests_get_longer_rows_in_their_turn(pipeline, values, alone):
    engine = stepped(pipeline, 4)
    pictures = [engine.picture(picture) for picture in values]
    short = submit(engine, pipeline, pictures, (0, 0, 1))
    engine.take_turn()
    first = engine._running.rows
    long = engine.submit(pictures[1], "", pipeline.options({"max_output_len": 90}))
    behind = submit(engine, pipeline, pictures, (2, 0, 0))
    assert not engine._running.fits(long.input_ids, long.options)
    finish(engine)
    assert engine._running.rows is not first
    assert same(told(short), alone[0, 0, 1])
    assert told(long)[0][0] == alone[1, 0, 0][0][0]
    assert same(told(behind), alone[2, 0, 0])


def test_a_session_without_rows_answers_in_batches(pipeline, values, alone, monkeypatch):
    monkeypatch.setattr(NativeSession, "has_rows", False)
    sizes, generate = [], NativeSession.generate

    def counted(session, input_ids, table, options):
        sizes.append(len(input_ids))
        return generate(session, input_ids, table, options)

    monkeypatch.setattr(NativeSession, "generate", counted)
    engine = stepped(pipeline, 8)
    pictures = [engine.picture(picture) for picture in values]
    asked = {key: submit(engine, pipeline, pictures, key) for key in alone}
    finish(engine)
    for key, request in asked.items():
        assert same(told(request), alone[key])
    assert sorted(set(sizes)) == [1, 9]  # samples alone, others by their options


def test_one_of_a_batch_that_fails_fails_alone(pipeline, values, alone, monkeypatch):
    monkeypatch.setattr(NativeSession, "has_rows", False)
    generate = NativeSession.generate

    def picky(session, input_ids, table, options):
        if any(torch.equal(row, bad.query_output) for row in table):
            raise Blip2Error("the OPT yields NaN or Inf")
        return generate(session, input_ids, table, options)

    monkeypatch.setattr(NativeSession, "generate", picky)
    engine = stepped(pipeline, 8)
    pictures = [engine.picture(picture) for picture in values]
    bad = pictures[1]
    asked = [submit(engine, pipeline, pictures, (n, 0, 0)) for n in range(3)]
    finish(engine)
    assert same(told(asked[0]), alone[0, 0, 0])
    assert same(told(asked[2]), alone[2, 0, 0])
    with pytest.raises(Blip2Error, match="the OPT yields"):
        told(asked[1])


def test_many_threads_ask_stream_and_leave(pipeline, values, alone):
    engine = Engine(pipeline, 6)
    pictures = [engine.picture(picture) for picture in values]
    keys = list(alone)
    wrong = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(8):
            key = chance.choice(keys)
            request = submit(engine, pipeline, pictures, key)
            if chance.random() < 0.3:
                next(request.tokens(), None)
                request.cancel()
            elif chance.random() < 0.5 and "num_beams" not in OPTIONS[key[2]]:
                if "".join(request.pieces()) != alone[key][0][0]:
                    wrong.append(key)
            elif not same(told(request), alone[key]):
                wrong.append(key)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.call(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0)
    waiting = [submit(engine, pipeline, pictures, (0, 0, 0)) for _ in range(3)]
    engine.close()
    engine.close()
    for request in waiting:
        if not request.is_over:
            pytest.fail("nobody ends it")
    with pytest.raises(Blip2Error, match="the engine is closed"):
        submit(engine, pipeline, pictures, (0, 0, 0))


def test_a_model_that_is_forgotten_lets_its_engine_go(pipeline):
    model = blip2.Model(pipeline)
    model.caption(scene(0).image, max_output_len=1)
    thread = model._engine._thread
    assert thread.is_alive()
    del model
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_listener_is_told_of_each_token_and_of_the_end(pipeline, values):
    engine = Engine(pipeline, 8)
    heard: list[int | None] = []
    options = pipeline.options({"max_output_len": 5})
    picture = engine.picture(values[0])
    request = engine.submit(picture, "", options, 0, lambda _, token: heard.append(token))
    assert heard_of(request) == heard[:-1]
    assert heard[-1] is None
    assert set(request.stages) == {"wait", "ViT", "Q-Former", "OPT"}
    again = engine.submit(picture, "", options)  # which was looked at
    again.answers()
    assert set(again.stages) == {"wait", "OPT"}
    assert all(seconds >= 0 for seconds in again.stages.values())
    engine.close()


def heard_of(request) -> list[int]:
    tokens = list(request.tokens())
    request.answers()
    return tokens


def test_rows_have_room_for_the_longest_from_the_start(pipeline, values):
    """Otherwise a long request would wait until no short one is under way."""
    engine = stepped(pipeline, 4)
    assert engine.load == Load(0, 0, 0, 4)
    engine = SteppedEngine(pipeline, 4, prompt_len=20, max_output_len=100)
    picture = engine.picture(values[0])
    short = engine.submit(picture, "", pipeline.options({"max_output_len": 20}))
    engine.take_turn()
    engine._note_load()
    assert engine.load == Load(0, 1, 1, 4)
    rows = engine._running.rows
    long = engine.submit(picture, "", pipeline.options({"max_output_len": 100}))
    finish(engine)
    assert short.is_over
    assert long.is_over
    assert engine._running.rows is rows
    engine._note_load()
    assert engine.load == Load(0, 0, 0, 4)

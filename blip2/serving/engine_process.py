"""The process that has the engines: requests in by frames, pieces of text out.

Apart from the one that speaks HTTP, so that parsing requests never makes the engine's thread wait, and
that one process answers `/health` whatever the other does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blip2.errors import Blip2Error
from blip2.serving.conversation import fitting_prompt
from blip2.serving.frames import Channel, Frame
from blip2.serving.slots import SharedMemory
from blip2.serving.texts import GrowingText, first_stop
from blip2.templates import TEMPLATE, fill_template

if TYPE_CHECKING:
    from blip2.engine import Engine, Picture, Request
    from blip2.pipeline import Answer, Pipeline

# The engine's thread queues launches between waits for the GPU: whoever else runs Python here must
# not keep it from that for Python's usual 5 ms.
_SWITCH_INTERVAL = 1e-4
_LULL = 0.005  # seconds that they wait, at most, until it waits for the GPU anyway …
_FEW = 4  # … unless they have only so many tokens to hand on: of them the first ones are waited for


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What the process opens, and the bounds of a request.

    Attributes:
        places: arguments of `Places.of`, which this process has no need to import.
        verify: compare large files with their hashes.
        max_txt_len: tokens of a prompt; None is as many as the engine has room for, at most 128.
        max_output_len: tokens of an answer.
        max_beams: of a beam search.
        max_rows: answers at once; None is what suits the engines.
    """

    places: dict[str, str | None]
    verify: bool
    max_txt_len: int | None
    max_output_len: int
    max_beams: int
    max_rows: int | None = None


_USUAL_TXT_LEN = 128


def run(
    channel: Channel, settings: EngineSettings, memory: SharedMemory, joining: socket.socket
) -> None:
    """Open the engines, say so, and answer until the server has gone.

    Args:
        channel: of the server, whose end is this process's too.
        settings: what to open.
        memory: where pixels will be.
        joining: where connections of other processes arrive, each with its memory.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        host = Host(settings)
    except Blip2Error as error:
        channel.write({"failed": str(error)})
        return
    host.run(channel, memory, joining)


class Host:
    """The engines, and who asks them."""

    def __init__(self, settings: EngineSettings) -> None:
        """Open the engines and have them make what they need.

        Raises:
            Blip2Error: they cannot be opened, or have no room for such requests.
        """
        import torch

        from blip2 import onnx_sessions
        from blip2.engine import Engine
        from blip2.engines import Places
        from blip2.pipeline import open_pipeline

        places = Places.of(**settings.places)
        onnx_sessions.own_process()
        self.pipeline = open_pipeline(places, settings.verify)
        if self.pipeline.vision.device.type == "cuda":
            # What is left for processors is small. More threads would spin for what comes next, and
            # take the engine's thread its turn.
            torch.set_num_threads(1)
        parts = json.dumps(places.fingerprints(), sort_keys=True)
        self._fingerprint = hashlib.sha256(parts.encode("ascii")).hexdigest()
        if self.pipeline.language.is_in_step:
            raise Blip2Error(
                "several processes cannot serve together",
                "leave out mpirun, and use an engine for one GPU",
            )
        self.max_txt_len = _longest_prompt(self.pipeline, settings)
        picture_len = self.pipeline.vision.num_query_tokens
        self.engine = Engine(
            self.pipeline,
            settings.max_rows,
            prompt_len=picture_len + self.max_txt_len,
            max_output_len=settings.max_output_len,
        )
        self._settings = settings
        self.news: queue.SimpleQueue[tuple[Answering, Request | None, int | None]] = (
            queue.SimpleQueue()
        )

    def run(self, channel: Channel, memory: SharedMemory, joining: socket.socket) -> None:
        """Answer until the server has gone; raises EOFError or OSError then."""
        _warm_up(self.engine, self.pipeline, self._max_beams)
        threading.Thread(target=self._tell, daemon=True).start()
        threading.Thread(target=self._let_join, args=(joining,), daemon=True).start()
        Asker(self, channel, memory).run()

    def _let_join(self, joining: socket.socket) -> None:
        """Hear those that join, each by a thread of its own."""
        while True:
            _, descriptors, _, _ = socket.recv_fds(joining, 1, 2)
            if not descriptors:
                return  # the server has gone
            connection, memory = descriptors
            channel = Channel(socket.socket(fileno=connection))
            asker = Asker(self, channel, SharedMemory(os.fdopen(memory, "r+b")))
            threading.Thread(target=asker.run_until_gone, daemon=True).start()

    def _tell(self) -> None:
        """Send what the engine makes, all that is there at once: of a step in one frame or two."""
        while True:
            events = [self.news.get()]
            while not self.news.empty():
                events.append(self.news.get())
            if len(events) > _FEW:
                self.engine.lull.wait(_LULL)
            news: dict[Asker, list] = {}
            for answering, request, token in events:
                told = answering.asker.hear(answering, request, token)
                if told:
                    news.setdefault(answering.asker, []).extend(told)
            for asker, told in news.items():
                asker.tell(told)

    def facts(self) -> dict[str, Any]:
        """What a server must know; see `blip2.serving.engine.Facts`."""
        vision = self.pipeline.vision
        return {
            "preprocessing": dataclasses.asdict(vision.preprocessing),
            "rows": self.engine.load.rows,
            "max_txt_len": self.max_txt_len,
            "max_output_len": self._settings.max_output_len,
            "max_beams": self._max_beams,
            "fingerprint": self._fingerprint,
        }

    @property
    def _max_beams(self) -> int:
        limits = self.pipeline.language.limits
        most = [self._settings.max_beams, self.engine.load.rows, limits.max_num_beams]
        return min(filter(None, most))


class Asker:
    """A process that speaks HTTP, and what it has asked. Another cannot see or end that."""

    def __init__(self, host: Host, channel: Channel, memory: SharedMemory) -> None:
        """Of a process whose pixels are in `memory`."""
        self._host, self._channel, self._memory = host, channel, memory
        self._pictures: dict[str, Picture] = {}
        self._asked: dict[int, Answering] = {}
        self._frames_lock = threading.Lock()

    def run(self) -> None:
        """Do what it asks until it has gone; raises EOFError or OSError then."""
        self._write({"ready": self._host.facts()})
        doers = {
            "picture": self._take_picture,
            "forget": lambda frame: self._pictures.pop(frame.message["key"], None),
            "ask": self._ask,
            "cancel": self._cancel,
            "load": lambda _: self._write({"load": dataclasses.asdict(self._host.engine.load)}),
        }
        while True:
            frame = self._channel.read()
            self._host.engine.lull.wait(_LULL)
            doers[frame.message["do"]](frame)

    def run_until_gone(self) -> None:
        """Do what it asks; when it has gone, nobody works for it any more."""
        try:
            self.run()
        except (EOFError, OSError):
            pass
        finally:
            for answering in list(self._asked.values()):
                self._end(answering.number)
            self._channel.close()
            self._memory.close()

    def hear(
        self, answering: Answering, request: Request, token: int | None
    ) -> list[tuple[int, dict[str, Any]]]:
        """What there is to tell of a token, or of an answer's end."""
        if answering.number not in self._asked:  # cancelled, or stopped
            return []
        told = []
        for event in answering.hear(request, token):
            told.append((answering.number, event))
            if "text" not in event:
                self._asked.pop(answering.number, None)
        return told

    def tell(self, news: list[tuple[int, dict[str, Any]]]) -> None:
        """Send news; to a process that has gone nothing is sent."""
        with contextlib.suppress(OSError):
            self._write({"news": news})

    def _write(self, message: dict[str, Any]) -> None:
        with self._frames_lock:
            self._channel.write(message)

    def _take_picture(self, frame: Frame) -> None:
        import torch

        shape, slot = frame.message["shape"], frame.message["slot"]
        there = self._memory.slot(slot, math.prod(shape))
        pixels = torch.frombuffer(there, dtype=torch.uint8).view(shape)
        # For a GPU from other memory the copy would be waited for, and it waits for the steps before.
        on_gpu = self._host.pipeline.vision.device.type == "cuda"
        pixels = pixels.pin_memory() if on_gpu else pixels.clone()
        self._write({"took": [slot]})
        self._pictures[frame.message["key"]] = self._host.engine.picture(pixels)

    def _ask(self, frame: Frame) -> None:
        message, host = frame.message, self._host
        tokenizer = host.pipeline.tokenizer

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

        answering = Answering(self, message["id"], tokenizer.decode, message["stop"])
        try:
            turns, template = message["turns"], message["template"]
            longest = min(host.max_txt_len, message["max_txt_len"] or host.max_txt_len)
            prompt = fitting_prompt(turns, message["question"], template, count, longest)
            if prompt is None:
                self._write({"news": [[answering.number, {"error": "too_long"}]]})
                return
            answering.prompt = prompt
            self._asked[answering.number] = answering
            answering.request = host.engine.submit(
                self._pictures[message["picture"]],
                prompt,
                host.pipeline.options(message["options"]),
                message["number"],
                lambda request, token: host.news.put((answering, request, token)),
            )
        except Exception as error:
            self._asked.pop(answering.number, None)
            _log(error)
            code = "refused" if isinstance(error, Blip2Error) else "engine"
            self._write({"news": [[answering.number, {"error": code}]]})

    def _cancel(self, frame: Frame) -> None:
        self._end(frame.message["id"])

    def _end(self, number: int) -> None:
        answering = self._asked.pop(number, None)
        if answering is not None and answering.request is not None:
            answering.request.cancel()


class Answering:
    """A request of the server's, and the text that is made for it."""

    def __init__(self, asker: Asker, number: int, decode: Any, stops: list[str]) -> None:
        self.asker, self.number, self.prompt = asker, number, ""
        self.request: Request | None = None
        self._stops = stops
        self._text = GrowingText(decode, stops)

    def hear(self, request: Request, token: int | None) -> list[dict[str, Any]]:
        """What there is to tell of a token, or of the end: pieces of text, then "end" or "error"."""
        from blip2.pipeline import Answer

        if token is None:
            return self._end(request)
        events = [{"text": piece}] if (piece := self._text.add(token)) else []
        if self._text.has_stopped and request.options.num_beams == 1:
            request.cancel()
            answer = Answer(self._text.text)
            events.append({"end": self._summary(request, [answer])})
        return events

    def _end(self, request: Request) -> list[dict[str, Any]]:
        try:
            answers = request.answers()
        except BaseException as error:
            _log(error)
            return [{"error": "memory" if _is_memory(error) else "engine"}]
        events = [{"text": piece}] if (piece := self._text.finish()) else []
        return [*events, {"end": self._summary(request, answers)}]

    def _summary(self, request: Request, answers: Sequence[Answer]) -> dict[str, Any]:
        described = [self._describe(answer) for answer in answers]
        seconds = dict(request.stages)  # of one that a stop text has ended, without the last
        seconds.setdefault("OPT", time.monotonic() - request.arrived - sum(seconds.values()))
        return {
            "finish_reason": described[0]["finish_reason"],
            "prompt": self.prompt,
            "prompt_tokens": len(request.input_ids),
            "completion_tokens": self._text.tokens,
            "seconds": seconds,
            "answers": described,
        }

    def _describe(self, answer: Answer) -> dict[str, Any]:
        """An answer as far as the first stop text."""
        if (end := first_stop(answer.text, self._stops)) is not None:
            answer = dataclasses.replace(answer, text=answer.text[:end], finished=True)
        reason = "stop" if answer.finished else "length"
        return {**answer.to_json(), "finish_reason": reason}


def _longest_prompt(pipeline: Pipeline, settings: EngineSettings) -> int:
    """Tokens that a prompt may have beside its picture and its answer.

    Raises:
        Blip2Error: the engine has no room for any, or not for as many as were asked for.
    """
    limits, picture = pipeline.language.limits, pipeline.vision.num_query_tokens
    room = limits.max_total_len - picture - settings.max_output_len
    if limits.max_input_len is not None:
        room = min(room, limits.max_input_len - picture)
    if room < (settings.max_txt_len or 1):
        raise Blip2Error(
            f"this OPT takes {limits.max_total_len} tokens: {picture} for the picture,"
            f" `max_output_len` {settings.max_output_len}, and {settings.max_txt_len or 1} for a prompt"
            " are too many",
            "lower `max_output_len` or `max_txt_len`",
        )
    return settings.max_txt_len or min(room, _USUAL_TXT_LEN)


def _warm_up(engine: Engine, pipeline: Pipeline, max_beams: int) -> None:
    """Have everything compiled, and graphs made for every number of rows, before anyone waits."""
    import torch

    vision = pipeline.vision
    question = fill_template(TEMPLATE, "what is this?")

    def ask(**decoding: object) -> None:
        blank = torch.zeros(3, vision.preprocessing.height, vision.preprocessing.width)
        options = pipeline.options({"max_output_len": 2, **decoding})
        engine.submit(engine.picture(blank), question, options).answers()

    engine.warm_up(question, pipeline.options({"max_output_len": 2}))
    ask()
    if vision.device.type != "cuda":
        return
    ask(temperature=1.0)
    if max_beams > 1:
        ask(num_beams=min(5, max_beams))


def _is_memory(error: BaseException) -> bool:
    from blip2 import memory

    return isinstance(error, memory.OutOfMemory)


def _log(error: BaseException) -> None:
    """Tell the operator, and nobody else."""
    if isinstance(error, Blip2Error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)

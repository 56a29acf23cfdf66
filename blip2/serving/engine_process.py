"""The process that has the engines: requests in by frames, pieces of text out.

Apart from the one that speaks HTTP, so that parsing requests never makes the engine's thread wait, and
that one process answers `/health` whatever the other does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import queue
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


def run(channel: Channel, settings: EngineSettings, memory: SharedMemory) -> None:
    """Open the engines, say so, and answer until the server has gone; pixels come in `memory`."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        host = Host(channel, settings, memory)
    except Blip2Error as error:
        channel.write({"failed": str(error)})
        return
    host.run()


class Host:
    """The engines, and what is asked of them. One thread reads what comes, one writes what is made."""

    def __init__(self, channel: Channel, settings: EngineSettings, memory: SharedMemory) -> None:
        """Open the engines and have them make what they need.

        Raises:
            Blip2Error: they cannot be opened, or have no room for such requests.
        """
        import torch

        from blip2 import onnx_sessions
        from blip2.engine import Engine
        from blip2.engines import Places
        from blip2.pipeline import open_pipeline

        self._channel, self._memory = channel, memory
        places = Places.of(**settings.places)
        onnx_sessions.own_process()
        self._pipeline = open_pipeline(places, settings.verify)
        if self._pipeline.vision.device.type == "cuda":
            # What is left for processors is small. More threads would spin for what comes next, and
            # take the engine's thread its turn.
            torch.set_num_threads(1)
        parts = json.dumps(places.fingerprints(), sort_keys=True)
        self._fingerprint = hashlib.sha256(parts.encode("ascii")).hexdigest()
        if self._pipeline.language.is_in_step:
            raise Blip2Error(
                "several processes cannot serve together",
                "leave out mpirun, and use an engine for one GPU",
            )
        self._max_txt_len = _longest_prompt(self._pipeline, settings)
        picture_len = self._pipeline.vision.num_query_tokens
        self._engine = Engine(
            self._pipeline,
            settings.max_rows,
            prompt_len=picture_len + self._max_txt_len,
            max_output_len=settings.max_output_len,
        )
        self._settings = settings
        self._pictures: dict[str, Picture] = {}
        self._asked: dict[int, Answering] = {}
        self._news: queue.SimpleQueue[tuple[Answering, Request | None, int | None]] = (
            queue.SimpleQueue()
        )
        self._frames_lock = threading.Lock()

    def run(self) -> None:
        """Answer until the server has gone; raises EOFError or OSError then."""
        _warm_up(self._engine, self._pipeline, self._max_beams)
        threading.Thread(target=self._tell, daemon=True).start()
        self._write({"ready": self._facts()})
        doers = {
            "picture": self._take_picture,
            "forget": lambda frame: self._pictures.pop(frame.message["key"], None),
            "ask": self._ask,
            "cancel": self._cancel,
            "load": lambda _: self._write({"load": dataclasses.asdict(self._engine.load)}),
        }
        while True:
            frame = self._channel.read()
            doers[frame.message["do"]](frame)

    def _write(self, message: dict[str, Any]) -> None:
        with self._frames_lock:
            self._channel.write(message)

    def _facts(self) -> dict[str, Any]:
        vision = self._pipeline.vision
        return {
            "preprocessing": dataclasses.asdict(vision.preprocessing),
            "rows": self._engine.load.rows,
            "max_txt_len": self._max_txt_len,
            "max_output_len": self._settings.max_output_len,
            "max_beams": self._max_beams,
            "fingerprint": self._fingerprint,
        }

    @property
    def _max_beams(self) -> int:
        limits = self._pipeline.language.limits
        most = [self._settings.max_beams, self._engine.load.rows, limits.max_num_beams]
        return min(filter(None, most))

    def _take_picture(self, frame: Frame) -> None:
        import torch

        shape, slot = frame.message["shape"], frame.message["slot"]
        there = self._memory.slot(slot, math.prod(shape))
        pixels = torch.frombuffer(there, dtype=torch.uint8).view(shape)
        # For a GPU from other memory the copy would be waited for, and it waits for the steps before.
        on_gpu = self._pipeline.vision.device.type == "cuda"
        pixels = pixels.pin_memory() if on_gpu else pixels.clone()
        self._write({"took": [slot]})
        self._pictures[frame.message["key"]] = self._engine.picture(pixels)

    def _ask(self, frame: Frame) -> None:
        message = frame.message
        tokenizer = self._pipeline.tokenizer

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

        answering = Answering(message["id"], tokenizer.decode, message["stop"])
        try:
            turns, template = message["turns"], message["template"]
            longest = min(self._max_txt_len, message["max_txt_len"] or self._max_txt_len)
            prompt = fitting_prompt(turns, message["question"], template, count, longest)
            if prompt is None:
                self._write({"news": [[answering.number, {"error": "too_long"}]]})
                return
            answering.prompt = prompt
            self._asked[answering.number] = answering
            answering.request = self._engine.submit(
                self._pictures[message["picture"]],
                prompt,
                self._pipeline.options(message["options"]),
                message["number"],
                lambda request, token: self._news.put((answering, request, token)),
            )
        except Exception as error:
            self._asked.pop(answering.number, None)
            _log(error)
            code = "refused" if isinstance(error, Blip2Error) else "engine"
            self._write({"news": [[answering.number, {"error": code}]]})

    def _cancel(self, frame: Frame) -> None:
        answering = self._asked.pop(frame.message["id"], None)
        if answering is not None and answering.request is not None:
            answering.request.cancel()

    def _tell(self) -> None:
        """Send what the engine makes, all that is there at once: of a step in one frame or two."""
        try:
            while True:
                events = [self._news.get()]
                while not self._news.empty():
                    events.append(self._news.get())
                news = []
                for answering, request, token in events:
                    if answering.number not in self._asked:  # cancelled, or stopped
                        continue
                    for event in answering.hear(request, token):
                        news.append([answering.number, event])
                        if "text" not in event:
                            del self._asked[answering.number]
                if news:
                    self._write({"news": news})
        except OSError:
            return  # the server has gone


class Answering:
    """A request of the server's, and the text that is made for it."""

    def __init__(self, number: int, decode: Any, stops: list[str]) -> None:
        self.number, self.prompt = number, ""
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

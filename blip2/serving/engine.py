"""The engines as the server sees them: a process that answers when it is asked.

process = await EngineProcess.start(settings, memory)
engines = Engines(process.stream, took)
facts = await engines.ready()
asked = await engines.ask(...)
while news := await asked.news(): ...
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import socket
from collections.abc import Callable
from typing import Any

from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.serving import engine_process
from blip2.serving.engine_process import EngineSettings
from blip2.serving.errors import Refusal, broken
from blip2.serving.frames import Stream
from blip2.serving.processes import Peer
from blip2.serving.slots import SharedMemory
from blip2.templates import TEMPLATE


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a server must know of its engines; lengths in tokens.

    `fingerprint` changes with them, and with nothing else.
    """

    preprocessing: Preprocessing
    rows: int
    max_txt_len: int
    max_output_len: int
    max_beams: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Load:
    """What the engines have to do; as `blip2.engine.Load`."""

    waiting: int = 0
    running: int = 0
    rows_used: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked about a picture.

    Attributes:
        text: empty for a caption.
        turns: earlier questions and their answers about the same picture, oldest first.
        options: fields of GenerationOptions.
        stop: texts before which an answer ends.
        template: what questions are put into.
        max_txt_len: tokens of the prompt, if fewer than the server takes.
    """

    text: str
    turns: tuple[tuple[str, str], ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stop: tuple[str, ...] = ()
    template: str = TEMPLATE
    max_txt_len: int | None = None


class EnginesEnded(Exception):
    """The process with the engines has ended, for whatever reason."""


class EngineProcess:
    """The process that has the engines, for whoever has started it."""

    def __init__(self, peer: Peer, joining: socket.socket) -> None:
        """Made by `start`."""
        self._peer, self._joining = peer, joining

    @classmethod
    async def start(cls, settings: EngineSettings, memory: SharedMemory) -> EngineProcess:
        """Have the engines opened; pixels will be in `memory`."""
        ours, theirs = socket.socketpair()
        with theirs:
            peer = await Peer.start("blip2-engines", engine_process.run, settings, memory, theirs)
        return cls(peer, ours)

    @property
    def stream(self) -> Stream:
        """To ask the engines on."""
        return self._peer.stream

    def connect(self, memory: SharedMemory) -> socket.socket:
        """A connection for another process to ask them on, whose pixels will be in `memory`.

        Raises:
            OSError: they have ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._joining, [b"\0"], [theirs.fileno(), memory.fileno()])
        return ours

    def close(self) -> None:
        """End it."""
        self._joining.close()
        self._peer.kill()


class Engines:
    """The engines, as one process that speaks HTTP sees them."""

    def __init__(self, stream: Stream, took: Callable[[int], None]) -> None:
        """Of engines that may be loading still.

        Args:
            stream: to ask them on.
            took: called with the slot of a picture that they have taken.
        """
        self._stream, self._took = stream, took
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[Asked, int]] = {}  # with the number of the choice
        self._loads: list[asyncio.Future[Load]] = []
        self._ready: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Task[None] = asyncio.create_task(self._listen())

    async def ready(self) -> Facts:
        """What the engines are, once they are loaded.

        Raises:
            Blip2Error: they cannot be.
            EnginesEnded: their process has ended before.
        """
        return await asyncio.shield(self._ready)

    @property
    def are_ready(self) -> bool:
        """Whether they are loaded, and still there."""
        is_over = self._ready.done() and self._ready.exception() is None
        return is_over and not self.ended.done()

    @property
    def facts(self) -> Facts:
        """Of engines that are ready."""
        return self._ready.result()

    async def load_picture(self, key: str, shape: list[int], slot: int) -> None:
        """Give them the picture in a slot, to be called `key`. Raises OSError: they have ended."""
        await self._stream.send({"do": "picture", "key": key, "shape": shape, "slot": slot})

    def forget_picture(self, key: str) -> None:
        """Let a picture go; requests that have it keep it."""
        self._stream.send_soon({"do": "forget", "key": key})

    async def ask(self, picture: str, question: Question, choices: int = 1) -> Asked:
        """Ask about a picture that they have, `choices` times; each draws numbers of its own.

        Raises:
            OSError: the engines have ended.
        """
        asked = Asked(self)
        message = {
            "do": "ask",
            "picture": picture,
            "question": question.text,
            "turns": question.turns,
            "options": question.options,
            "stop": question.stop,
            "template": question.template,
            "max_txt_len": question.max_txt_len,
        }
        try:
            for choice in range(choices):
                number = next(self._numbers)
                self._asked[number] = (asked, choice)
                asked.numbers.append(number)
                await self._stream.send({**message, "id": number, "number": choice})
        except BaseException:  # the client may leave between two of them
            self.cancel(asked)
            raise
        return asked

    async def load(self) -> Load:
        """What they have to do now."""
        if not self.are_ready:
            return Load()
        self._loads.append(asyncio.get_running_loop().create_future())
        waiting = self._loads[-1]
        await self._stream.send({"do": "load"})
        return await waiting

    def cancel(self, asked: Asked) -> None:
        """Have nobody work for a request any more; does nothing for what of it is over."""
        for number in asked.numbers:
            if self._asked.pop(number, None) is not None and not self.ended.done():
                self._stream.send_soon({"do": "cancel", "id": number})

    def close(self) -> None:
        """Ask nothing more."""
        self.ended.cancel()
        self._stream.close()

    async def _listen(self) -> None:
        try:
            while True:
                self._take((await self._stream.receive()).message)
        except (EOFError, OSError):
            pass
        finally:
            gone = EnginesEnded("the process with the engines has ended")
            if not self._ready.done():
                self._ready.set_exception(gone)
                self._ready.exception()  # nobody need wait for it
            for asked, choice in self._asked.values():
                asked.put(choice, {"error": "engine"})
            self._asked.clear()
            for waiting in self._loads:
                waiting.cancel()

    def _take(self, message: dict[str, Any]) -> None:
        for number, event in message.get("news", ()):
            if number not in self._asked:  # cancelled
                continue
            asked, choice = self._asked[number]
            asked.put(choice, event)
            if "text" not in event:
                del self._asked[number]
        for slot in message.get("took", ()):
            self._took(slot)
        if "load" in message:
            waiting = self._loads.pop(0)
            if not waiting.done():  # who asked may have left
                waiting.set_result(Load(**message["load"]))
        if "failed" in message:
            self._ready.set_exception(Blip2Error(message["failed"]))
        if "ready" in message:
            facts = message["ready"]
            preprocessing = Preprocessing.from_dict(facts.pop("preprocessing"))
            self._ready.set_result(Facts(preprocessing, **facts))


@dataclasses.dataclass(frozen=True)
class End:
    """How an answer ended.

    `finish_reason` is "stop" or "length", `prompt` what OPT read, `seconds` are by stage; `answers` are
    the text, or a beam search's best first: each with text, score, flags and finish_reason.
    """

    finish_reason: str
    prompt: str
    prompt_tokens: int
    completion_tokens: int
    seconds: dict[str, float]
    answers: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class News:
    """What a choice has grown by, and how it ended if it has."""

    choice: int
    text: str
    end: End | None = None


class Asked:
    """A request that the engines have. Its news wait here, however slowly they are taken."""

    def __init__(self, engines: Engines) -> None:
        """Made by `Engines.ask`."""
        self.numbers: list[int] = []  # that the engines call its choices
        self._engines = engines
        self._news: list[tuple[int, dict[str, Any]]] = []
        self._has_news = asyncio.Event()

    def put(self, choice: int, event: dict[str, Any]) -> None:
        """Add news."""
        self._news.append((choice, event))
        self._has_news.set()

    async def news(self) -> list[News]:
        """What has come since, at most one piece of news of each choice; waits for some.

        Raises:
            Refusal: the engines could not answer.
        """
        await self._has_news.wait()
        self._has_news.clear()
        news, self._news = self._news, []
        texts: dict[int, str] = {}
        ends: dict[int, End] = {}
        for choice, event in news:
            if "error" in event:
                raise _refusal(event["error"], self._engines)
            texts[choice] = texts.get(choice, "") + event.get("text", "")
            if "end" in event:
                ends[choice] = End(**event["end"])
        return [News(choice, text, ends.get(choice)) for choice, text in texts.items()]

    def cancel(self) -> None:
        """Let nobody work for it any more."""
        self._engines.cancel(self)


def _refusal(code: str, engines: Engines) -> Refusal:
    if code == "too_long":
        limit = engines.facts.max_txt_len
        return Refusal(
            400,
            f"the question has too many tokens; this server takes {limit}, or fewer if max_txt_len"
            " says so: shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    if code == "refused":
        return Refusal(400, "the engines of this server cannot take such a request")
    if code == "memory":
        return Refusal(
            503,
            "there is not enough memory for this request now; ask again, or for less",
            code="out_of_memory",
            retry_after=5,
        )
    return broken()

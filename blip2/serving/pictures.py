"""Pictures on their way to the engines: decoded by processes, and kept by their content.

    async with pictures.hold(content) as held: ...     # the engines have it, by held.name

The same picture asked again is neither decoded nor looked at again. What decides its values is what
it is kept by: SHA-256 of all of its bytes, and no part or property of it; all else that decides them
(sizes, mean, precision) is the same as long as the server runs.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable

from blip2.images import FORMATS, Preprocessing
from blip2.serving import decoding
from blip2.serving.engine import Engines
from blip2.serving.errors import Refusal, broken
from blip2.serving.processes import Peer
from blip2.serving.slots import Slots

KEPT = 512  # pictures of a server; of BLIP-2's OPT-2.7B 160 kB of the GPU's memory each
_START_SECONDS = 60.0  # for a process to start in, on a busy machine

_WRONG = {
    "unknown": f"the picture is in none of the formats {', '.join(FORMATS)}",
    "large": f"the picture has more than {decoding.MAX_PIXELS} pixels; scale it down first",
    "damaged": "the picture is damaged, or cannot be decoded; save it again as JPEG or PNG",
}


class Unwanted(Exception):
    """Whoever asked for a picture has left."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Where the pixels of a picture are: 3 x S x S, uint8."""

    shape: list[int]
    slot: int


class Decoders:
    """Processes that decode a picture each, at most for so long."""

    def __init__(
        self, count: int, seconds: float, preprocessing: Preprocessing, slots: Slots
    ) -> None:
        """Start none yet.

        Args:
            count: processes.
            seconds: that a picture may take.
            preprocessing: what the ViT takes.
            slots: where pixels go, one at least for each process.
        """
        self._seconds, self._slots = seconds, slots
        self._first = decoding.first_message(preprocessing)
        # None is a process that is to be started.
        self._idle: asyncio.LifoQueue[Peer | None] = asyncio.LifoQueue()
        for _ in range(count):
            self._idle.put_nowait(None)
        self._peers: set[Peer] = set()

    async def decode(self, content: bytes, is_wanted: Callable[[], bool]) -> Decoded:
        """A picture's pixels, in a slot that whoever has read them gives back.

        Args:
            content: the file's.
            is_wanted: asked when a process is free for it.

        Raises:
            Refusal: it is none, damaged, too large, or takes too long.
            Unwanted: nobody waits for it any more.
        """
        peer, slot = await self._idle.get(), None
        try:
            if not is_wanted():
                raise Unwanted
            if peer is not None and not peer.is_alive:  # killed while it had nothing to do
                self._end(peer)
                peer = None
            if peer is None:
                peer = await self._start()
            slot = await self._slots.take()
            try:
                answer = peer.stream.ask({"slot": slot}, content)
                message = (await asyncio.wait_for(answer, self._seconds)).message
                if wrong := message.get("wrong"):
                    raise _refused(_WRONG[wrong], f"picture_{wrong}")
                decoded, slot = Decoded(message["shape"], slot), None
                return decoded
            except Refusal:
                raise
            except BaseException:  # it is somewhere in this picture, or dead
                self._end(peer)
                peer = None
                raise
        except asyncio.TimeoutError:
            raise _refused("the picture takes too long to decode", "picture_slow") from None
        except (EOFError, OSError):
            raise _refused(_WRONG["damaged"], "picture_damaged") from None
        finally:
            self._idle.put_nowait(peer)
            if slot is not None:  # whose process is idle, or dead
                self._slots.give_back(slot)

    async def start(self) -> None:
        """Have all processes started, so that no picture waits for one."""
        waiting = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        started = await asyncio.gather(*(self._start() for _ in waiting), return_exceptions=True)
        for peer in started:  # one that could not be started is tried again when it is needed
            self._idle.put_nowait(peer if isinstance(peer, Peer) else None)

    async def _start(self) -> Peer:
        peer = await Peer.start("blip2-decoder", decoding.run, self._slots.memory)
        self._peers.add(peer)
        try:
            await asyncio.wait_for(peer.stream.ask(self._first), _START_SECONDS)
        except BaseException as error:
            self._end(peer)
            if isinstance(error, EOFError | OSError | asyncio.TimeoutError):
                raise broken() from None
            raise
        return peer

    def _end(self, peer: Peer) -> None:
        self._peers.discard(peer)
        peer.kill()

    def close(self) -> None:
        """End them."""
        for peer in list(self._peers):
            self._end(peer)


def _refused(message: str, code: str) -> Refusal:
    return Refusal(400, message, param="messages", code=code)


@dataclasses.dataclass(frozen=True)
class Held:
    """A picture that the engines have: what they call it, its SHA-256, and whether it was new."""

    name: str
    sha256: str
    is_new: bool


@dataclasses.dataclass
class _Kept:
    name: str
    loading: asyncio.Task[None] | None = None
    users: int = 0

    @property
    def is_wanted(self) -> bool:
        return self.users > 0


class Pictures:
    """What the engines have of the pictures that were asked about."""

    def __init__(self, engines: Engines, decoders: Decoders, kept: int = KEPT) -> None:
        """Of engines that are ready; `kept` pictures stay there when nobody asks about them."""
        self._engines, self._decoders, self._limit = engines, decoders, kept
        self._kept: collections.OrderedDict[str, _Kept] = collections.OrderedDict()
        self._names = itertools.count()

    @contextlib.asynccontextmanager
    async def hold(self, content: bytes) -> AsyncIterator[Held]:
        """Within, the engines have this picture.

        Raises:
            Refusal: it cannot be decoded.
        """
        digest = hashlib.sha256(content).hexdigest()
        kept = self._kept.get(digest)
        is_new = kept is None
        if kept is None:
            # A name is used once: what is let go late is never another's.
            kept = self._kept[digest] = _Kept(str(next(self._names)))
            kept.loading = asyncio.create_task(self._load(digest, kept, content))
            # Who asked may have left: then nobody hears of it, and asyncio need not complain.
            kept.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._kept.move_to_end(digest)
        kept.users += 1
        try:
            await asyncio.shield(kept.loading)
            yield Held(kept.name, digest, is_new)
        finally:
            kept.users -= 1
            self._tidy()
            if not kept.users and self._kept.get(digest) is not kept:
                self._engines.forget_picture(kept.name)

    def forget(self, digest: str) -> None:
        """Keep a picture no longer than it is held: the engines could make nothing of it."""
        self._kept.pop(digest, None)

    def __len__(self) -> int:
        return len(self._kept)

    async def _load(self, digest: str, kept: _Kept, content: bytes) -> None:
        try:
            decoded = await self._decoders.decode(content, lambda: kept.is_wanted)
            try:
                await self._engines.load_picture(kept.name, decoded.shape, decoded.slot)
            except OSError:
                raise broken() from None
        except Unwanted:
            self._kept.pop(digest, None)
        except BaseException:
            if self._kept.get(digest) is kept:
                del self._kept[digest]
            raise
        self._tidy()

    def _tidy(self) -> None:
        """Let the oldest of too many go, but for those that somebody has or waits for."""
        excess = len(self._kept) - self._limit
        if excess <= 0:
            return
        idle = [d for d, kept in self._kept.items() if not kept.users and kept.loading.done()]
        for digest in idle[:excess]:
            self._engines.forget_picture(self._kept.pop(digest).name)

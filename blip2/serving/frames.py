"""What the server's processes send one another: JSON, and bytes beside it. Never a pickle.

A frame is two lengths (little-endian, 4 bytes each), a JSON object and raw bytes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, NamedTuple

_LENGTHS = struct.Struct("<II")
_LIMIT = 1 << 22  # bytes that asyncio reads ahead


class Frame(NamedTuple):
    """A message and the bytes that belong to it."""

    message: dict[str, Any]
    content: bytes


def encode(message: dict[str, Any], content: bytes = b"") -> list[bytes]:
    """The parts of a frame, in order; none is empty.

    An empty one stays in asyncio's buffer from Python 3.12 on, whose event loop then tries to send it
    again and again, at the cost of a whole processor (`_SelectorSocketTransport.writelines`).
    """
    text = json.dumps(message).encode("ascii")
    head = _LENGTHS.pack(len(text), len(content)) + text
    return [head, content] if content else [head]


async def read(reader: asyncio.StreamReader) -> Frame:
    """The next frame.

    Raises:
        EOFError, OSError: the other process has ended.
    """
    text, content = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    message = json.loads(await reader.readexactly(text))
    return Frame(message, await reader.readexactly(content))


class Stream:
    """The end of a process that has an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Made by `open`."""
        self._reader, self._writer = reader, writer
        self._draining = asyncio.Lock()  # asyncio before 3.10.6 lets only one task wait for that

    @classmethod
    async def open(cls, connection: socket.socket) -> Stream:
        """Of a connected stream socket, which it owns from now on."""
        return cls(*await asyncio.open_connection(sock=connection, limit=_LIMIT))

    async def send(self, message: dict[str, Any], content: bytes = b"") -> None:
        """Send a frame; waits while the other process has too much to read.

        Raises:
            OSError: it has ended.
        """
        self._writer.writelines(encode(message, content))
        async with self._draining:
            await self._writer.drain()

    def send_soon(self, message: dict[str, Any]) -> None:
        """Send a small frame without waiting; to a process that has ended nothing is sent."""
        if not self._writer.is_closing():
            self._writer.writelines(encode(message))

    async def receive(self) -> Frame:
        """The next frame.

        Raises:
            EOFError, OSError: the other process has ended.
        """
        return await read(self._reader)

    async def ask(self, message: dict[str, Any], content: bytes = b"") -> Frame:
        """Send a frame and wait for the next one. Raises as `send` and `receive`."""
        await self.send(message, content)
        return await self.receive()

    def close(self) -> None:
        """Hear and say nothing more."""
        self._writer.close()


class Channel:
    """The end of a process that has no event loop. One thread may read while another writes."""

    def __init__(self, connection: socket.socket) -> None:
        """Of a connected stream socket, which is blocking from now on."""
        connection.setblocking(True)
        self._connection = connection

    def read(self) -> Frame:
        """The next frame; waits for it.

        Raises:
            EOFError, OSError: the other process has ended.
        """
        text, content = _LENGTHS.unpack(self._read(_LENGTHS.size))
        return Frame(json.loads(self._read(text)), self._read(content))

    def write(self, message: dict[str, Any], content: bytes = b"") -> None:
        """Send a frame; waits until the system has taken it.

        Raises:
            OSError: the other process has ended.
        """
        for part in encode(message, content):
            self._connection.sendall(part)

    def detach(self) -> socket.socket:
        """The socket, for a `Stream`."""
        return self._connection

    def close(self) -> None:
        """Hear and say nothing more."""
        self._connection.close()

    def _read(self, count: int) -> bytearray:
        content = bytearray(count)
        view = memoryview(content)
        while view:
            received = self._connection.recv_into(view)
            if not received:
                raise EOFError
            view = view[received:]
        return content

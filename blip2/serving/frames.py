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

    def _read(self, count: int) -> bytearray:
        content = bytearray(count)
        view = memoryview(content)
        while view:
            received = self._connection.recv_into(view)
            if not received:
                raise EOFError
            view = view[received:]
        return content

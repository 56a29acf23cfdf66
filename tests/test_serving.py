"""Parts of the server alone: what is hard to see from outside."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving_runs import question

pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")

from starlette.responses import JSONResponse

from blip2.errors import Blip2Error
from blip2.images import Preprocessing, resized_pixels
from blip2.many import inputs
from blip2.programs import serve
from blip2.serving import chat, decoding, fetch, frames, listening, many
from blip2.serving.app import ServiceSettings
from blip2.serving.body import Bodies, Incoming
from blip2.serving.chat import Bounds
from blip2.serving.conversation import fitting_prompt, prompt_of
from blip2.serving.engine import Engines, Question
from blip2.serving.errors import Refusal
from blip2.serving.fetch import Target, is_public
from blip2.serving.frames import Channel, Frame
from blip2.serving.front import Front
from blip2.serving.pictures import Decoded, Pictures
from blip2.serving.texts import GrowingText
from blip2.serving.together import Together
from blip2.templates import TEMPLATE


def decode(ids: list[int]) -> str:
    """As byte-level tokenizers do it: a byte a token, without blanks around."""
    return bytes(ids).decode("utf-8", "replace").strip()


BOUNDS = Bounds("blip2", max_beams=10, max_output_len=64, takes_urls=False)
GREEDY = {"max_output_len": 64, "num_beams": 1}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, GREEDY),
        ({"temperature": 0}, GREEDY),
        ({"temperature": 0, "top_p": 0.5, "top_k": 7, "seed": 3}, GREEDY),
        ({"temperature": None, "top_p": 1, "stop": None, "n": None}, GREEDY),
        ({"max_tokens": 1000}, GREEDY),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {**GREEDY, "max_output_len": 7}),
        ({"num_beams": 4, "length_penalty": -1}, {**GREEDY, "num_beams": 4, "length_penalty": -1}),
        ({"temperature": 0.5, "seed": 3}, {**GREEDY, "temperature": 0.5, "top_k": 0, "seed": 3}),
        (
            {"top_p": 0.9, "seed": 3},
            {**GREEDY, "temperature": 1, "top_k": 0, "top_p": 0.9, "seed": 3},
        ),
        ({"top_k": 5, "seed": 3}, {**GREEDY, "temperature": 1, "top_k": 5, "seed": 3}),
    ],
)
def test_how_an_answer_is_decoded(fields, expected):
    """Greedy, as run.py does it, unless something says otherwise; a temperature of 0 does not."""
    body = json.dumps(question("what?", b"picture", **fields)).encode()
    assert chat.parse(body, BOUNDS).question.options == expected


def test_draws_without_a_seed_are_others_each_time():
    body = json.dumps(question("", b"picture", temperature=1)).encode()
    assert len({chat.parse(body, BOUNDS).question.options["seed"] for _ in range(5)}) == 5


def test_pictures_are_fetched_only_where_the_operator_has_asked_for_it():
    """LMDeploy's CVE-2026-33626: whoever installed it had a way into his network."""
    body = json.dumps(question("", "https://example.com/a.png")).encode()
    with pytest.raises(Refusal) as caught:
        chat.parse(body, BOUNDS)
    assert caught.value.code == "image_urls_not_allowed"
    allowed = dataclasses.replace(BOUNDS, takes_urls=True)
    assert chat.parse(body, allowed).picture == "https://example.com/a.png"
    assert not ServiceSettings().takes_urls


letters = st.text(alphabet="ab é\N{WHITE SMILING FACE}", max_size=20)


@settings(max_examples=300)
@given(letters, st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3))
@example("aab", ["ab"])
@example("a\N{WHITE SMILING FACE}b", ["\N{WHITE SMILING FACE}"])
def test_pieces_are_the_text_before_the_first_stop_text(text, stops):
    growing = GrowingText(decode, stops)
    pieces = []
    for token in text.encode():
        pieces.append(growing.add(token))
        if growing.has_stopped:
            break
    pieces.append(growing.finish())
    whole = text.strip()
    prefixes = (whole[:end] for end in range(len(whole) + 1))
    first = next((p for p in prefixes if any(stop in p for stop in stops)), None)
    said = "".join(pieces)
    # A stop text that ends in a blank may have been seen before the blank was known to be the last.
    if not any(stop != stop.strip() for stop in stops):
        ends = [len(stop) for stop in stops if first and first.endswith(stop)]
        assert said == (whole if first is None else first[: -max(ends)])
        assert growing.has_stopped == (first is not None)
    assert not any(stop in said for stop in stops)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert growing.text == said


def test_turns_are_joined_as_lavis_does_it():
    """As its notebooks: "Question: {} Answer: {}." for each, joined by blanks."""
    context = [("which city is this?", "singapore"), ("why?", "it has a merlion.")]
    assert prompt_of(context, "what is next to it?") == (
        "Question: which city is this? Answer: singapore. Question: why? Answer: it has a merlion."
        " Question: what is next to it? Answer:"
    )
    assert prompt_of(context, "  ") == ""
    assert prompt_of([("", "a statue"), ("why?", "")], "Question: who? Answer:") == (
        "Question: who? Answer:"
    )


def test_the_oldest_turns_are_left_out_first():
    turns = [(f"question {n}", f"answer {n}") for n in range(5)]

    def count(text: str) -> int:
        return len(text.split())

    assert fitting_prompt(turns, "last", TEMPLATE, count, 15) == (
        "Question: question 3 Answer: answer 3. Question: question 4 Answer: answer 4."
        " Question: last Answer:"
    )
    assert fitting_prompt(turns, "last", TEMPLATE, count, 3) == "Question: last Answer:"
    assert fitting_prompt(turns, "last", TEMPLATE, count, 2) is None


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.31.255.255", "192.168.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "no address", ""),
    ],
)
def test_addresses_that_are_not_public(address):
    """As IANA's registries have them, and what carries another address in it."""
    assert not is_public(address)


class Web:
    """Names and what is behind them: servers here, at addresses that look public."""

    def __init__(self, monkeypatch) -> None:
        self.names: dict[str, list[list[str]]] = {}  # the answers to the first question, the next …
        self.pages: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self._connect = asyncio.open_connection
        self._port = 0
        monkeypatch.setattr(fetch.asyncio, "open_connection", self._open)

    async def _open(self, address, _port, server_hostname=None, **_):
        self.asked.append((address, server_hostname))
        return await self._connect("127.0.0.1", self._port)

    async def _resolve(self, host, port, **_):
        if host not in self.names:
            raise socket.gaierror(f"no {host}")
        answers = self.names[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    def fetch(self, url: str, most: int = 1000) -> bytes:
        async def serve(reader, writer) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            writer.write(self.pages[path])
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()

        async def run() -> bytes:
            asyncio.get_running_loop().getaddrinfo = self._resolve
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            self._port = server.sockets[0].getsockname()[1]
            return await fetch.fetch(url, most)

        return asyncio.run(run())


def page(content: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@pytest.fixture
def web(monkeypatch) -> Web:
    found = Web(monkeypatch)
    found.names = {
        "good.test": [["93.184.216.34"]],
        "inside.test": [["10.0.0.1"]],
        "both.test": [["93.184.216.34", "127.0.0.1"]],
        "again.test": [["93.184.216.34"], ["127.0.0.1"]],
    }
    found.pages = {
        "/a": page(b"picture"),
        "/to-inside": page(b"", "302 Found", Location="http://inside.test/secret"),
        "/to-address": page(b"", "301 Moved", Location="http://127.0.0.1/secret"),
        "/to-file": page(b"", "302 Found", Location="file:///etc/passwd"),
        "/to-a": page(b"", "302 Found", Location="/a"),
        "/round": page(b"", "302 Found", Location="/round"),
        "/large": page(b"x" * 2000),
        "/endless": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"400\r\n"
        + b"x" * 4000,
        "/cut": page(b"x" * 100)[:-50],
        "/gone": page(b"/usr/secret/path", "404 Not Found"),
        "/nonsense": b"\x00\x01\x02 nonsense\r\n\r\n",
        "/two": page(b"", "302 Found", Location="/a") + b"x",
    }
    return found


def test_a_public_picture_is_fetched(web):
    assert web.fetch("http://good.test/a") == b"picture"
    assert web.fetch("http://good.test/to-a") == b"picture"
    assert {address for address, _ in web.asked} == {"93.184.216.34"}


@pytest.mark.parametrize(
    "url",
    [
        *("http://inside.test/a", "http://both.test/a", "http://nowhere.test/a"),
        *("http://good.test/to-inside", "http://good.test/to-address", "http://good.test/to-file"),
        *("http://good.test/round", "http://good.test/large", "http://good.test/endless"),
        *("http://good.test/cut", "http://good.test/gone", "http://good.test/nonsense"),
    ],
)
def test_what_is_not_fetched(web, url):
    with pytest.raises(Refusal) as caught:
        web.fetch(url)
    assert caught.value.status == 400
    assert all(is_public(address) for address, _ in web.asked)
    for telltale in ("secret", "10.0", "127.0", "Errno", "h11"):
        assert telltale not in caught.value.message


def test_three_redirects_are_followed(web):
    for number in range(1, 5):
        place = f"/r{number - 1}" if number > 1 else "/a"
        web.pages[f"/r{number}"] = page(b"", "307 Temporary Redirect", Location=place)
    assert web.fetch("http://good.test/r3") == b"picture"
    with pytest.raises(Refusal, match="redirects too often"):
        web.fetch("http://good.test/r4")


def test_a_name_is_resolved_once_for_each_request(web):
    """A second answer, which leads inside, is never asked for."""
    assert web.fetch("http://again.test/a") == b"picture"
    assert web.names["again.test"] == [["127.0.0.1"]]
    assert [address for address, _ in web.asked] == ["93.184.216.34"]


@pytest.mark.parametrize(
    "url, host, path",
    [
        ("HTTP://Good.Test", "good.test", "/"),
        ("http://good.test/a b", None, None),
        ("http://good.test/é?q=ü#part", "good.test", "/%C3%A9?q=%C3%BC"),
        ("https://bücher.example/a", "xn--bcher-kva.example", "/a"),
        ("http://good.test\\@inside.test/", None, None),
        ("http://good.test\r\nX: y/", None, None),
        ("http://good.test/a\\b", None, None),
        ("http://a@good.test/", None, None),
        ("http://[fe80::1%25eth0]/", None, None),
    ],
)
def test_one_parser_says_where_and_what(url, host, path):
    if host is None:
        with pytest.raises(Refusal):
            Target.parse(url)
        return
    target = Target.parse(url)
    assert (target.host, target.path) == (host, path)


class FakeEngines:
    """Engines that only note which pictures they have."""

    def __init__(self) -> None:
        self.has: list[str] = []

    async def load_picture(self, key, _shape, _slot) -> None:
        self.has.append(key)

    def forget_picture(self, key) -> None:
        if key in self.has:
            self.has.remove(key)


class FakeDecoders:
    """Decoders that wait to be let, and refuse what is bad."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.may = asyncio.Event()

    async def decode(self, content: bytes, is_wanted: Callable[[], bool]) -> Frame:
        from blip2.serving.pictures import Unwanted

        await self.may.wait()
        if not is_wanted():
            raise Unwanted
        self.asked.append(content)
        if content == b"bad":
            raise Refusal(400, "bad")
        return Decoded([3, 2, 2], 0)


def test_pictures_are_kept_by_content_and_let_go_in_time():
    async def run() -> None:
        engines, decoders = FakeEngines(), FakeDecoders()
        pictures = Pictures(engines, decoders, kept=2)

        async def ask(content: bytes) -> bool:
            async with pictures.hold(content) as held:
                assert held.name in engines.has
                return held.is_new

        # Two ask at once: decoded once. One of them leaves: the other gets it all the same.
        leaving, staying = (asyncio.create_task(ask(b"one")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        decoders.may.set()
        assert await staying is False
        assert decoders.asked == [b"one"]
        # What nobody waits for any more is not decoded, and can be asked for again.
        decoders.may.clear()
        leaving = asyncio.create_task(ask(b"left"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        decoders.may.set()
        await asyncio.sleep(0.01)
        assert decoders.asked == [b"one"]
        assert await ask(b"left") is True
        # What is bad is not kept, and is bad again.
        for _ in range(2):
            with pytest.raises(Refusal):
                await ask(b"bad")
        assert len(engines.has) == 2
        # The oldest goes, unless somebody has it.
        async with pictures.hold(b"one") as held:
            for name in (b"two", b"three"):
                assert await ask(name) is True
            assert held.name in engines.has
        assert await ask(b"three") is False
        assert await ask(b"left") is True
        assert len(engines.has) == len(pictures) == 2
        # What the engines could make nothing of goes with its last user.
        async with pictures.hold(b"three") as held:
            pictures.forget(held.sha256)
            assert held.name in engines.has
        assert held.name not in engines.has

    asyncio.run(asyncio.wait_for(run(), 10))


def get_health(host: str, log: io.TextIOBase, is_local: bool) -> int:
    """Ask a front for it; the status."""

    async def app(scope, receive, send) -> None:
        await JSONResponse({})(scope, receive, send)

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    sent = []

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "headers": [(b"host", host.encode())],
    }
    asyncio.run(Front(app, (), log, is_local=is_local)(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    "host, is_local, status",
    [
        *(("localhost:8000", True, 200), ("LOCALHOST", True, 200), ("127.0.0.1:8000", True, 200)),
        *(("[::1]:8000", True, 200), ("127.9.9.9", True, 200), ("evil.example", True, 421)),
        *(("localhost.evil.example:8000", True, 421), ("10.0.0.1", True, 421), ("", True, 421)),
        ("evil.example", False, 200),
    ],
)
def test_a_name_that_comes_to_mean_this_machine_gets_nothing(host, is_local, status):
    """DNS rebinding: the browser takes its page and this server for one site."""
    assert get_health(host, io.StringIO(), is_local) == status


def test_a_line_of_the_log_is_written_at_once():
    """Also where Python buffers nothing: several processes write into one log."""
    written = []

    class Log(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, content) -> int:
            written.append(bytes(content))
            return len(content)

    unbuffered = io.TextIOWrapper(Log(), write_through=True)  # as PYTHONUNBUFFERED makes it
    assert get_health("localhost", unbuffered, True) == 200
    [line] = written
    assert line.endswith(b"}\n")
    assert json.loads(line)["path"] == "/health"


def test_bodies_are_bounded_together():
    """Many clients that each send less than the largest."""

    async def run() -> None:
        bodies = Bodies(most=100, seconds=5, together=150)
        headers = {"content-type": "application/json", "content-length": "90"}
        go_on = asyncio.Event()

        def incoming() -> Incoming:
            parts = [b"x" * 60, b"x" * 30]

            async def receive():
                if len(parts) == 1:
                    await go_on.wait()
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

            return Incoming(receive, headers)

        reading = [asyncio.create_task(bodies.read(incoming(), headers)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert [task.done() for task in reading] == [False, False, True]
        with pytest.raises(Refusal) as caught:
            await reading[2]
        assert caught.value.status == 429
        reading[1].cancel()
        await asyncio.wait([reading[1]])
        go_on.set()
        assert len(await reading[0]) == 90
        assert len(await bodies.read(incoming(), headers)) == 90

    asyncio.run(asyncio.wait_for(run(), 10))


def test_decoded_pixels_are_those_of_every_other_way():
    preprocessing = Preprocessing(24, 24)
    image = Image.effect_noise((40, 60), 90).convert("RGB")
    content = io.BytesIO()
    image.save(content, "PNG")
    found = decoding.decode(content.getvalue(), preprocessing)
    assert found.dtype == np.uint8
    assert np.array_equal(found, resized_pixels(image, preprocessing))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_is_sent_picture_by_picture(tmp_path, mode):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, mode) as writer:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = 600
            writer.addfile(member, io.BytesIO(name[:1].encode() * 600))
    contents = [many._content(picture) for picture in inputs.read_pictures([str(shard)])]
    assert contents == [b"a" * 600, b"b" * 600]


def test_other_systems_are_told_where_it_runs(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    with pytest.raises(Blip2Error, match="runs on Linux alone; run it in a container"):
        serve.main()


def test_the_socket_has_no_algorithm_that_waits():
    """asyncio switches Nagle's off where the protocol is given by name, and of accepted sockets too."""
    with listening.listen("127.0.0.1", 0) as opened:
        assert opened.proto == socket.IPPROTO_TCP
        assert opened.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("content", [b"", b"pixels"])
def test_no_part_of_a_frame_is_empty(content):
    """From Python 3.12 on asyncio would send an empty part again and again, for ever."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        parts = frames.encode({"do": "load"}, content)
        assert all(parts)
        ours.sendmsg(parts)
        assert Channel(theirs).read() == ({"do": "load"}, content)


def test_processes_count_together():
    """Each its own part; who has ended leaves nothing, and who looks and counts is not disturbed."""
    first = Together.create(3)
    second = first.of(1)
    first.add(4, 2)
    second.add(8, 1)
    assert (first.rows, first.answers) == (second.rows, second.answers) == (12, 3)
    first.of(1).forget()
    assert (second.rows, second.answers) == (4, 2)
    descriptor = first._memory.fileno()
    with contextlib.ExitStack() as held:
        held.enter_context(first.alone())
        other = subprocess.Popen(
            [sys.executable, "-c", _COUNT_ALONE, str(descriptor)],
            pass_fds=[descriptor],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert other.stdout.readline() == b"begun\n"
        time.sleep(0.2)  # in which it would count, if it did not wait
        assert first.rows == 4
    with other:
        other.wait(20)
    assert (first.rows, first.answers, other.returncode) == (5, 3, 0)


_COUNT_ALONE = """
import os, sys
from blip2.serving.slots import SharedMemory
from blip2.serving.together import Together

together = Together(SharedMemory(os.fdopen(int(sys.argv[1]), "r+b")), 2, 3)
print("begun", flush=True)
with together.alone():
    together.add(1, 1)
"""


class FakePeer:
    """The process with the engines, as far as it is asked."""

    def __init__(self) -> None:
        self.sent: list[dict] = []
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.may = asyncio.Event()

    async def send(self, message, _content=b"") -> None:
        self.sent.append(message)
        await self.may.wait()

    def send_soon(self, message) -> None:
        self.sent.append(message)

    async def receive(self) -> Frame:
        return await self.frames.get()


READY = {
    "preprocessing": dataclasses.asdict(Preprocessing(2, 2)),
    **{"rows": 4, "max_txt_len": 9, "max_output_len": 9, "max_beams": 2},
    "fingerprint": "x",
}


def test_who_leaves_while_he_is_asking_leaves_nothing_behind():
    """Between two choices of one request, or before the engines have said what they have to do."""

    async def run() -> None:
        peer = FakePeer()
        engines = Engines(peer, lambda _slot: None)
        peer.frames.put_nowait(Frame({"ready": dict(READY)}, b""))
        await engines.ready()
        asking = asyncio.create_task(engines.ask("picture", Question("what?"), 3))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert [message["do"] for message in peer.sent] == ["ask", "cancel"]
        assert peer.sent[0]["id"] == peer.sent[1]["id"]
        assert not engines._asked
        peer.may.set()
        leaving, staying = (asyncio.create_task(engines.load()) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.cancel()
        for rows in (1, 2):
            load = {"waiting": 0, "running": 0, "rows_used": rows, "rows": 4}
            peer.frames.put_nowait(Frame({"load": load}, b""))
        assert (await staying).rows_used == 2
        assert engines.are_ready
        engines.ended.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_news_wait_for_a_slow_reader_and_come_together():
    async def run() -> None:
        peer = FakePeer()
        peer.may.set()
        engines = Engines(peer, lambda _slot: None)
        peer.frames.put_nowait(Frame({"ready": dict(READY)}, b""))
        await engines.ready()
        asked = await engines.ask("picture", Question("what?"), 2)
        one, other = asked.numbers
        end = {
            **{"finish_reason": "stop", "prompt": "", "prompt_tokens": 3, "completion_tokens": 2},
            **{"seconds": {}, "answers": [{"text": "ab"}]},
        }
        for news in ([[one, {"text": "a"}], [other, {"text": "x"}]], [[one, {"text": "b"}]]):
            peer.frames.put_nowait(Frame({"news": news}, b""))
        peer.frames.put_nowait(Frame({"news": [[one, {"end": end}]]}, b""))
        await asyncio.sleep(0.01)
        found = {news.choice: news for news in await asked.news()}
        assert (found[0].text, found[0].end.completion_tokens) == ("ab", 2)
        assert (found[1].text, found[1].end) == ("x", None)
        peer.frames.put_nowait(Frame({"news": [[other, {"error": "engine"}]]}, b""))
        with pytest.raises(Refusal) as caught:
            await asked.news()
        assert caught.value.status == 500
        engines.ended.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))

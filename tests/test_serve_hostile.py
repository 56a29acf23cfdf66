"""serve.py meets those who mean it ill, or do not know better: one test for each way.

Each is answered within a second by a 4xx in OpenAI's form, which tells nothing of this machine or its
libraries; and the next request is answered as if nothing had been.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import encoded
from batch_runs import wait_for
from conftest import ROOT
from PIL import Image
from serving_runs import CAPTION, KEY, SCENE, Answer, Server, at_once, data_url, question

pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")
pytestmark = pytest.mark.xdist_group("serve")

# Paths, addresses in memory, modules and words of libraries.
TELLTALE = re.compile(
    r"/(work|home|root|usr|tmp|opt)/|0x[0-9a-f]{6,}|Traceback|File \"|\.py\b|PIL|Pillow|numpy|torch"
    r"|starlette|uvicorn|h11|asyncio|Errno|Exception|<_io|BytesIO|object at",
    re.IGNORECASE,
)


def check_refused(answer: Answer, *statuses: int) -> None:
    assert answer.status in (statuses or (400,)), (answer.status, answer.body[:300])
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not TELLTALE.search(answer.body.decode()), answer.body


@contextlib.contextmanager
def in_time(server: Server, seconds: float = 1.0):
    """What is done within takes no longer, and leaves a server that answers."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds * _PATIENCE
    server.check_answers()


_PATIENCE = 3  # machines that run tests have other things to do, too


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width: int, height: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


PICTURES = {
    "nothing": b"",
    "text": b"this is no picture",
    "html": b"<html><img src=x></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "cut": SCENE[:300],
    "a header alone": SCENE[:33],
    "pixels that are missing": png(500, 500, b"\0" * 100),
    "a bomb": png(30_000, 30_000, b"\0" * 100),
    "a bomb below Pillow's limit": png(8000, 8000, b"\0" * 100),
    "sides that overflow": png(0x7FFFFFFF, 0x7FFFFFFF, b""),
    "no sides": png(0, 0, b""),
}


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_no_picture_is_refused_in_our_words(server, name):
    """CVE-2026-22778: a decoder's own words told where things lie in memory."""
    with in_time(server):
        answer = server.ask("", PICTURES[name] or "data:image/png;base64,")
        check_refused(answer)
    if "bomb" in name:
        assert answer.error["code"] == "picture_large"


def test_damaged_pictures_of_all_kinds(server):
    """Bytes changed at random: an answer or a 4xx, and nobody's words but ours."""
    chance = random.Random(3)
    image = Image.open(io.BytesIO(SCENE)).convert("RGB")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        for _ in range(6):
            content = bytearray(encoded(image, kind))
            for _ in range(chance.randrange(1, 30)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            answer = server.ask("", bytes(content), max_tokens=1)
            if answer.status != 200:
                check_refused(answer)
    server.check_answers()


def test_a_picture_of_one_pixel_is_answered(server):
    """CVE-2026-22773: it stopped the engine."""
    for size in ((1, 1), (1, 5000), (5000, 1)):
        with in_time(server):
            assert server.ask("", encoded(Image.new("RGB", size))).status == 200


def test_of_many_frames_only_the_first_counts(server):
    """CVE-2026-5497: frames without bound in a data: URL."""
    first = Image.open(io.BytesIO(SCENE)).convert("RGB").quantize(64)
    rest = [Image.new("P", first.size, n % 60) for n in range(600)]
    moving = encoded(first, "GIF", save_all=True, append_images=rest)
    still = encoded(first, "GIF")
    with in_time(server):
        assert server.ask("", moving).text == server.ask("", still).text
    jpegs = ",".join([base64.b64encode(SCENE).decode()] * 50)
    with in_time(server):
        check_refused(server.ask("", f"data:video/jpeg;base64,{jpegs}"))


def test_what_is_seen_is_what_people_see(server):
    """GHSA-8jr5-v98p-w75m: turned by EXIF, transparency over white; not the pixels below."""
    plain = Image.open(io.BytesIO(SCENE)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(plain.rotate(90, expand=True), "PNG", exif=exif)
    assert server.ask("", turned).text == CAPTION
    hidden = plain.copy()
    hidden.putalpha(0)
    white = encoded(Image.new("RGB", plain.size, "white"))
    found = [server.ask("", p, max_tokens=12).text for p in (encoded(hidden), white)]
    assert found[0] == found[1]
    assert not CAPTION.startswith(found[0])


def test_pictures_that_differ_anywhere_do_not_answer_for_one_another(server):
    """CVE-2025-46722: pictures with the same bytes but other sides had the same key."""
    pixels = np.asarray(Image.open(io.BytesIO(SCENE)).convert("RGB"))
    height, width, _ = pixels.shape
    other = pixels.reshape(height // 2, width * 2, 3)
    one, two = (b"P6 %d %d 255\n" % (p.shape[1], p.shape[0]) + p.tobytes() for p in (pixels, other))
    assert one[-pixels.nbytes :] == two[-pixels.nbytes :]
    first = server.ask("", one).json["blip2"]
    second = server.ask("", two).json["blip2"]
    assert first["answers"][0]["text"] == CAPTION
    assert second["answers"][0]["text"] != CAPTION
    assert first["picture"]["sha256"] != second["picture"]["sha256"]
    assert not second["picture"]["known"]


BOUNDED = [
    ("n", 10**6), ("n", 0), ("n", -1), ("n", 1.5), ("n", "2"), ("n", True), ("n", 10**400),
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10**12), ("max_tokens", "9"),
    ("max_completion_tokens", 10**30), ("num_beams", 11), ("num_beams", 0), ("top_k", 10**9),
    ("top_k", -1), ("seed", -1), ("seed", 2**63), ("seed", 0.5), ("temperature", -1),
    ("temperature", 10**9), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.01),
    ("length_penalty", 10**6), ("repetition_penalty", 0), ("repetition_penalty", -3),
    ("max_txt_len", 0), ("stop", ["x"] * 5), ("stop", [""]), ("stop", ["x" * 65]), ("stop", 7),
    ("stop", {"a": 1}), ("stream", "yes"), ("stream_options", {"include_usage": True}),
    ("model", 5), ("messages", []), ("messages", "hello"), ("messages", [7]), ("messages", None),
    ("messages", [{"role": "user", "content": "no picture"}] * 300),
    ("messages", [{"role": "pilot", "content": "x"}]), ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user", "content": "x"}]), ("prompt_template", "{} {}"),
    ("prompt_template", "none"), ("tools", [{"type": "function"}]), ("logprobs", True),
    ("response_format", {"type": "json_object"}), ("logit_bias", {"5": 100}),
    ("presence_penalty", 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BOUNDED, ids=[f"{n}-{str(v)[:20]}" for n, v in BOUNDED])
def test_every_field_has_bounds(server, name, value):
    """CVE-2026-34756: n without one."""
    answer = server.post({**question("", max_tokens=1), name: value})
    check_refused(answer)
    if name not in ("messages",) and abs(hash(str(value))) and answer.error["param"]:
        assert answer.error["param"] == name
    server.check_answers()


def test_numbers_that_json_has_not(server):
    for text in (b'{"n": NaN}', b'{"temperature": Infinity}', b'{"temperature": 1e999}'):
        check_refused(server.post(text))
    server.check_answers()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"{}" * 3, b"\0" * 100),
        *(b"[" * 100_000, b'{"a":' * 60_000, b"[" + b"{}," * 300_000 + b"{}]"),
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"9" * 5000,
    ],
    ids=lambda body: repr(body[:12]),
)
def test_bodies_that_are_no_request(server, body):
    with in_time(server):
        check_refused(server.post(body))


def test_a_body_of_many_parts_is_not_parsed(server):
    """Each would take many times the memory that it takes here."""
    for body in (b"[" + b"{}," * 300_000 + b"{}]", b"[" + b"1," * 300_000 + b"1]"):
        with in_time(server):
            answer = server.post(body)
            check_refused(answer)
            assert "too many parts" in answer.error["message"]


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "/etc/passwd", "ftp://example.com/a.png", "gopher://x", "x"),
        *("data:", "data:,x", "data:image/png;base64", "data:image/png,rawbytes", "javascript:1"),
        *("data:image/png;base64,@@@@", "data:image/png;base64,QUJ", "data:image/png;base64,é"),
        {"url": 5},
    ],
    ids=str,
)
def test_urls_that_are_no_pictures(server, url):
    body = question()
    body["messages"][0]["content"][0]["image_url"] = url if isinstance(url, dict) else {"url": url}
    with in_time(server):
        check_refused(server.post(body))


PRIVATE = [
    *("http://127.0.0.1/a.png", "http://localhost/a.png", "http://127.1/a.png"),
    *("http://0x7f000001/a.png", "http://2130706433/a.png", "http://0177.0.0.1/a.png"),
    *("http://[::1]/a.png", "http://[::ffff:127.0.0.1]/a.png", "http://[::ffff:7f00:1]/a.png"),
    *("http://[::]/a.png", "http://0.0.0.0/a.png", "http://10.0.0.1/a.png"),
    *("http://192.168.1.1/a.png", "http://172.16.0.1/a.png", "http://100.64.0.1/a.png"),
    *("http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/a.png", "http://[fd00::1]/a"),
    *("http://[64:ff9b::7f00:1]/a.png", "http://[2002:7f00:1::]/a.png", "http://224.0.0.1/a.png"),
    *("http://127.0.0.1\\@example.com/a.png", "http://example.com\\@127.0.0.1/a.png"),
    *("http://example.com@127.0.0.1/a.png", "http://user:word@127.0.0.1/a.png"),
    *("http://127.0.0.1\t/a.png", "http://exa mple.com/", "http://127.0.0.1%2f@x/", "http://"),
    *("http://localhost./a.png", "http://127.0.0.1:0x50/", "http://①②⑦.0.0.1/a.png"),
]


@pytest.mark.parametrize("url", PRIVATE)
def test_no_address_of_this_machine_or_its_network_is_asked(server, url):
    """GHSA-3f6c-7fw2-ppm4, CVE-2026-25960, CVE-2026-24779: whatever way it is written."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        url = re.sub(r"^(http://[^/\\@:]+|http://\[[^/]*\])/", rf"\1:{port}/", url)
        with in_time(server):
            answer = server.ask("", url)
            check_refused(answer)
            assert answer.error["code"] == "image_url_refused"
        listening.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listening.accept()


def raw(server: Server, *parts: bytes, pause: float = 0, wait: float = 5) -> bytes:
    """What comes back where these bytes are sent, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        received = b""
        with contextlib.suppress(ConnectionError):
            while block := connection.recv(1 << 16):
                received += block
        return received


def head(length: int | str, *more: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {length}" if isinstance(length, int) else length,
        "Connection: close",
        *more,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


def test_bodies_that_are_too_large(server):
    """By what they say, and by what comes; a kind of body that is not read (CVE-2024-47874)."""
    large = b"x" * (3 << 20)
    with in_time(server):
        answer = server.post(large)
        check_refused(answer, 413)
    chunked = b"".join(b"10000\r\n" + b"x" * 0x10000 + b"\r\n" for _ in range(40)) + b"0\r\n\r\n"
    with in_time(server):
        answered = raw(server, head("Transfer-Encoding: chunked") + chunked)
        assert status(answered) == 413
    with in_time(server):
        # It says that more will come, and sends nothing: refused without it.
        assert status(raw(server, head(1 << 40))) == 413
    for kind in ("multipart/form-data; boundary=x", "text/plain", "application/xml", ""):
        with in_time(server):
            answer = server.request(
                "POST", "/v1/chat/completions", b"--x\r\n" * 1000, **{"Content-Type": kind}
            )
            check_refused(answer, 415)
    packed = zlib.compress(b"x" * 1000)
    with in_time(server):
        check_refused(server.post(packed, **{"Content-Encoding": "deflate"}), 415)


def test_bodies_that_are_cut_off_or_slow(server):
    body = json.dumps(question()).encode()
    with in_time(server), socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(len(body)) + body[:100])
    begun = time.monotonic()
    with in_time(server, 2.5):
        assert status(raw(server, head(len(body)) + body[:100])) == 408  # --body_timeout 1
    assert time.monotonic() - begun > 0.9
    drops = [bytes([byte]) for byte in body[:60]]
    with in_time(server, 2.5):
        assert status(raw(server, head(len(body)), *drops, pause=0.05)) == 408


def test_requests_that_are_no_http(server):
    for content in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"x" * (1 << 20) + b"\r\n\r\n",
        b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        head("Transfer-Encoding: chunked") + b"zz\r\n",
        head(5, "Content-Length: 6") + b"12345",
        head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ):
        with in_time(server, 3):
            answered = raw(server, content)
            assert status(answered) in (0, 400, 408), answered
            assert not TELLTALE.search(answered.decode("latin-1"))


def test_headers_that_never_end(server):
    """One header every tenth of a second: the connection is closed after --idle_timeout."""
    begun = time.monotonic()
    lines = [b"GET /health HTTP/1.1\r\nHost: x\r\n"] + [b"X-A: b\r\n"] * 60
    answered = raw(server, *lines, pause=0.1, wait=8)
    assert status(answered) == 0
    assert 1.5 < time.monotonic() - begun < 9
    server.check_answers()


def test_a_thousand_connections_that_say_nothing(server):
    """They are closed after --idle_timeout, and others are answered meanwhile."""
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(1000)
        ]
        server.check_answers()
        begun = time.monotonic()
        for connection in silent:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert time.monotonic() - begun < 10
    server.check_answers()


def test_a_connection_that_asks_nothing_more_is_closed(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=8) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while block := connection.recv(4096):
            received += block
        assert status(received) == 200


def test_a_connection_that_goes_on_asking_stays(server):
    """For longer than --idle_timeout, whenever it is looked at between two requests."""
    with contextlib.closing(server.connect()) as connection:
        for _ in range(15):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(0.2)


def test_a_slow_reader_holds_nobody(server):
    """It takes no byte of its stream: its rows are free when its answer is made."""
    body = json.dumps(question("", stream=True, n=16)).encode()
    slow = []
    for _ in range(3):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head(len(body)) + body)
        slow.append(connection)
    try:
        with in_time(server, 2):
            assert server.ask("").text == CAPTION
        assert wait_for(lambda: server.metrics()["blip2_rows_used"] == 0, 3)
    finally:
        for connection in slow:
            connection.close()


def test_a_decoder_that_is_stuck_costs_one_request(server):
    """It is ended after --picture_timeout."""
    [decoder] = server.decoders()
    os.kill(decoder, signal.SIGSTOP)
    begun = time.monotonic()
    answer = server.ask("", SCENE + b"stuck")
    check_refused(answer)
    assert answer.error["code"] == "picture_slow"
    assert 1.5 < time.monotonic() - begun < 6
    assert server.ask("", SCENE + b"after it").text == CAPTION
    assert decoder not in server.processes()


def test_a_decoder_that_is_killed_costs_one_request_at_most(server):
    [decoder] = server.decoders()
    os.kill(decoder, signal.SIGSTOP)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(server.ask("", SCENE + b"killed")))
    asking.start()
    time.sleep(0.3)
    os.kill(decoder, signal.SIGKILL)
    asking.join()
    check_refused(answers[0])
    assert server.ask("", SCENE + b"after the kill").text == CAPTION
    [decoder] = server.decoders()
    os.kill(decoder, signal.SIGKILL)  # while it has nothing to do: nobody need notice
    time.sleep(0.2)
    assert server.ask("", SCENE + b"killed idle").text == CAPTION


def test_decoders_have_a_limit_of_memory(server):
    [decoder] = server.decoders()
    lines = Path(f"/proc/{decoder}/limits").read_text().splitlines()
    [limit] = [line.split()[3] for line in lines if line.startswith("Max address space")]
    assert 4 << 30 < int(limit) < 64 << 30


def test_one_bad_request_among_others_fails_alone(server):
    good = [lambda: server.ask("What colour is the circle?")] * 6
    bad = [
        lambda: server.ask("", b"no picture"),
        lambda: server.ask("x " * 300),
        lambda: server.post(b"{"),
        lambda: server.ask("", num_beams=99),
    ]
    with server.slowly():
        answers = at_once(
            *[call for pair in zip(good, bad + bad[:2], strict=True) for call in pair]
        )
    assert [answer.text for answer in answers[::2]] == ["red"] * 6
    for answer in answers[1::2]:
        check_refused(answer)


def test_keys_are_compared_in_constant_time():
    """Each by `hmac.compare_digest`, of digests of one length, whatever the first says."""
    source = (ROOT / "blip2" / "serving" / "front.py").read_text()
    assert source.count("compare_digest") == 1
    assert "for key in self._keys]" in source
    assert "sha256(key" in source


def test_it_listens_on_this_machine_alone_unless_told():
    """SGLang's CVE-2026-3059 and others: sockets for everyone that took pickles."""
    from blip2.serving.server import ServerSettings

    assert ServerSettings.__dataclass_fields__["host"].default == "127.0.0.1"
    for path in (ROOT / "blip2" / "serving").glob("*.py"):
        assert not re.search(r"import (pickle|marshal|shelve)|\beval\(", path.read_text()), path


def bad_request(number: int) -> tuple[bytes, dict[str, str]]:
    """One of many, no two of which are the same."""
    kinds = [
        lambda: json.dumps(question("", SCENE[:200] + os.urandom(2000))).encode(),
        lambda: json.dumps(question("", os.urandom(3000))).encode(),
        lambda: json.dumps(question("", n=number + 1000)).encode(),
        lambda: json.dumps(question("", f"http://127.0.0.1/{number}")).encode(),
        lambda: json.dumps(question(f"{number} " * 300)).encode(),
        lambda: b"{" + os.urandom(500),
        lambda: json.dumps({"model": f"model {number}"}).encode(),
    ]
    return kinds[number % len(kinds)](), {"X-Request-Id": f"bad.{number}"}


def send_bad_requests(server: Server, numbers: range) -> None:
    with contextlib.closing(server.connect()) as connection:
        for number in numbers:
            body, headers = bad_request(number)
            given = {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {KEY}",
                **headers,
            }
            connection.request("POST", "/v1/chat/completions", body, given)
            response = connection.getresponse()
            content = response.read()
            assert 400 <= response.status < 500, content
            assert not TELLTALE.search(content.decode()), content


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_bad_requests(server, count):
    send_bad_requests(server, range(300))  # what is made once is made
    before = server.memory()
    send_bad_requests(server, range(300, 300 + count))
    assert server.memory() - before < 8 << 20
    server.check_answers()


def test_a_file_of_this_machine_is_never_read(server):
    secret = Path("/tmp/blip2-test-secret.png")
    secret.write_bytes(SCENE)
    try:
        for url in (str(secret), f"file://{secret}", f"http://[{secret}]/", f"data:{secret}"):
            check_refused(server.ask("", url))
    finally:
        secret.unlink()


def test_data_urls_of_any_letters(server):
    """Base64 as the standard has it: no other letters in between, which others may read otherwise."""
    good = data_url(SCENE)
    assert server.ask("", good.replace("data:image/png", "DATA:IMAGE/PNG")).text == CAPTION
    for wrong in (good[:50] + "\n" + good[50:], good + "=", good[:-1] + "-", good + " "):
        check_refused(server.ask("", wrong))

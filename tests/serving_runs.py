"""What the tests of the server share: a running one, and requests to it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch_runs import CHECKPOINT, processes_of, wait_for
from conftest import ROOT

KEY = "key-of-the-tests"
SCENE = (ROOT / "demo" / "scene.png").read_bytes()
CAPTION = (
    "a small red circle, a small orange triangle, a large purple square and a large blue square"
    " on a gradient background"
)
FLAGS = {
    "--max_body_mb": "1",
    "--max_waiting": "8",
    "--request_timeout": "8",
    "--body_timeout": "1",
    "--idle_timeout": "2",
    "--picture_timeout": "2",
    "--shutdown_timeout": "10",
    "--workers": "1",
}


@dataclasses.dataclass
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclasses.dataclass
class Server:
    """A server process."""

    process: subprocess.Popen
    port: int
    directory: Path
    marker: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def slow(self) -> Path:
        return self.directory / "slow"

    @contextlib.contextmanager
    def slowly(self, step: float = 0.05) -> Iterator[None]:
        """Within, a step takes so many seconds."""
        written = self.slow.with_suffix(".new")
        written.write_text(str(step))
        written.replace(self.slow)  # whoever reads it finds all of it
        try:
            yield
        finally:
            self.slow.unlink()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        given = {"Authorization": f"Bearer {KEY}", **headers}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, {k: v for k, v in given.items() if v})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, **headers)

    def post(self, body: Any, **headers: str) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **headers}
        return self.request("POST", "/v1/chat/completions", content, **given)

    def ask(self, text: str = "", picture: bytes | str = SCENE, **more: Any) -> Answer:
        return self.post(question(text, picture, **more))

    def check_answers(self) -> None:
        """The next request succeeds."""
        answer = self.ask("What colour is the circle?")
        assert (answer.status, answer.text) == (200, "red"), answer.body

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "out").read_text().splitlines()]

    def said(self) -> str:
        return (self.directory / "err").read_text()

    def processes(self) -> list[int]:
        return processes_of(self.marker)

    def decoders(self) -> list[int]:
        """Processes other than the server's own and that with the engines, which are the largest."""
        found = [pid for pid in self.processes() if pid != self.process.pid]
        return [
            pid
            for pid in found
            if "torch" not in Path(f"/proc/{pid}/maps").read_text()
            and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def memory(self) -> int:
        """Bytes that all of its processes hold."""
        total = 0
        for pid in self.processes():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
        return total

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(self.said())
            with contextlib.suppress(OSError):
                return self.get("/ready").status == 200
            return False

        assert wait_for(is_ready, 60), self.said()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


def start(
    directory: Path, *arguments: str, script: str = "tests/serve_slowly.py", **flags: str
) -> Server:
    """A server of the demo checkpoint on a free port; it may be loading still."""
    directory.mkdir(exist_ok=True)
    marker = f"SERVER_OF_TEST={directory}"
    given = [word for pair in {**FLAGS, **flags}.items() for word in pair]
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        process = subprocess.Popen(
            [
                *(sys.executable, str(ROOT / script), "--port", "0"),
                *("--engine_dir", str(CHECKPOINT), "--opt_engine_dir", str(CHECKPOINT)),
                *given,
                *arguments,
            ],
            stdout=out,
            stderr=err,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "BLIP2_API_KEY": KEY,
                "SLOW": str(directory / "slow"),
                "SERVER_OF_TEST": str(directory),
                "PYTHONPATH": str(ROOT),
            },
        )
    server = Server(process, 0, directory, marker)
    assert wait_for(lambda: "http://" in server.said() or process.poll() is not None, 30)
    if process.poll() is None:
        server.port = int(server.said().split("http://127.0.0.1:")[1].split()[0])
    return server


def data_url(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def question(text: str = "", picture: bytes | str = SCENE, **more: Any) -> dict[str, Any]:
    """A request's body."""
    url = picture if isinstance(picture, str) else data_url(picture)
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "blip2", "messages": [{"role": "user", "content": parts}], **more}


def events(content: bytes) -> list[Any]:
    """Server-sent events, [DONE] as None."""
    found = [part.removeprefix("data: ") for part in content.decode().split("\n\n") if part]
    return [None if part == "[DONE]" else json.loads(part) for part in found]


def at_once(*functions) -> list[Any]:
    """What functions return that are called by threads of their own."""
    results: list[Any] = [None] * len(functions)

    def call(number: int) -> None:
        results[number] = functions[number]()

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def within(seconds: float) -> Any:
    """A context that fails where it takes longer: bounds that are promised, not speeds."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        begun = time.monotonic()
        yield
        assert time.monotonic() - begun < seconds

    return context()

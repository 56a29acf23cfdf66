"""Programs without the seconds that importing takes: forked from a process that has imported.

Only what others wrote is imported beforehand, nothing of this suite: a program meets its own imports
as ever, and its arguments, directory, environment, streams, signals and exit code are a new process's.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTED = (
    *("torch", "torch.export", "torch._dynamo", "torch.onnx", "onnx", "onnxscript", "PIL.Image"),
    *("torch.onnx._internal.exporter._core", "onnxscript.optimizer", "safetensors.torch"),
    *("tokenizers", "transformers", "huggingface_hub", "tqdm"),  # onnxruntime starts a thread
)
# Of variables, those that what is imported may have read; the rest is asked of the program's own.
_READ = re.compile(
    "CUDA|HF_|HUGGING|KMP|LD_|MKL|OMP|ONEDNN|TORCH|TRANSFORMERS|XDG"
    "|PYTHON(?!BREAKPOINT)"  # which a test process has as soon as it has called Ray
)


def is_possible(environment: Mapping[str, str]) -> bool:
    """Whether a program under these variables can be forked: on Linux, where imports saw the same.

    And where they saw no GPU, as one that a process has looked at its forks cannot use, and were to
    have one thread, as with more NumPy starts some when it is imported, which a fork lacks.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    if not hasattr(os, "pidfd_open") or os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return False
    changed = dict(set(environment.items()) ^ set(_start()[1].items()))
    return not any(map(_READ.match, changed))


class Program:
    """A running one; as far as it goes, a `subprocess.Popen` whose output is captured as text."""

    def __init__(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> None:
        """Start `python ARGUMENTS`, a script's path or `-m` and a module first, in a directory."""
        self.args, self.returncode = list(arguments), None
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed once they are read
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._report, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb") as nothing:
            streams = [file.fileno() for file in (theirs, nothing, self._out, self._err)]
            request = json.dumps([[*arguments], str(cwd), dict(environment)]).encode()
            socket.send_fds(_start()[0], [request], streams)
        self.pid = self._read()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._report.settimeout(timeout)
            try:
                self.returncode = self._read()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._report.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        printed = []
        for file in (self._out, self._err):
            with file:
                file.seek(0)
                printed.append(file.read())
        return printed[0], printed[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _read(self) -> int:
        if not (content := self._report.recv(8)):
            raise RuntimeError("what forks the programs has ended")
        return int.from_bytes(content, "little", signed=True)


@functools.cache
def _start() -> tuple[socket.socket, Mapping[str, str]]:
    """Where requests go, of which each is forked a program, until the tests end; and its variables."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
        )
    return ours, environment


def serve(requests: socket.socket) -> list[str] | None:
    """Fork on each request. In the child: what it is to run; None once nobody asks any more."""
    running: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is requests:
                    content, streams, *_ = socket.recv_fds(requests, 1 << 20, 4)
                    if not content:
                        return None
                    pid = os.fork()
                    if not pid:
                        arguments, cwd, environment = json.loads(content)
                        for stream, number in zip(streams[1:], range(3), strict=True):
                            os.dup2(stream, number)
                        for stream in streams:
                            os.close(stream)
                        os.chdir(cwd)
                        os.environ.clear()
                        os.environ.update(environment)
                        return arguments
                    report = socket.socket(fileno=streams[0])
                    for stream in streams[1:]:
                        os.close(stream)
                    report.send(pid.to_bytes(8, "little"))
                    handle = os.pidfd_open(pid)
                    running[handle] = pid, report
                    ready.register(handle, selectors.EVENT_READ)
                else:
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    pid, report = running.pop(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with report, contextlib.suppress(OSError):
                        report.send(code.to_bytes(8, "little", signed=True))


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        __import__(name)
    tasks = len(os.listdir("/proc/self/task"))
    if threading.active_count() > 1 or tasks > 1:
        raise RuntimeError(f"{tasks} threads: what a library starts as it is imported a fork lacks")
    gc.freeze()  # or collecting garbage would copy what is shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own end is this process's
    arguments = serve(requests)
    requests.close()
    if arguments is None:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
        setattr(sys, f"__{name}__", getattr(sys, name))
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()

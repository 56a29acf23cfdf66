"""Steps, each done once: what a run that was ended has done is not done again.

with Steps(journal, options) as steps:
    exported = steps.command("export", [sys.executable, "onnx_export.py"], made=directory)
    if exported.failed: ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blip2.many.journal import Journal

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Step:
    """What was done: how long it took, the most memory it held, what it printed last.

    Attributes:
        name: of the step.
        command: as it can be given again; empty of what was not tried.
        failed: why, where it did not succeed or was not tried.
        seconds: from outside the process.
        memory: bytes; 0 where the system does not say.
        printed: the last lines of its output.
        result: what it found, for the report.
    """

    name: str
    command: str = ""
    failed: str = ""
    seconds: float = 0.0
    memory: int = 0
    printed: str = ""
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


class Steps:
    """Runs steps and remembers those that succeeded, in a journal. What failed is tried again."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        """Open or make the journal.

        Raises:
            Blip2Error: it cannot be written, or was begun with other options.
        """
        self._path, self._journal = path, Journal(path, 1, options)
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        self._done = {line["path"]: Step(line.pop("path"), **line) for line in lines}
        self.all: list[Step] = []

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.__exit__(*exception)

    def is_done(self, name: str) -> bool:
        """Whether a step of that name has succeeded."""
        return name in self._done

    def skip(self, name: str, reason: str) -> Step:
        """Say why a step is not tried."""
        return self._add(Step(name, failed=f"not tried: {reason}"))

    def command(
        self,
        name: str,
        command: Sequence[object],
        made: Path | None = None,
        result: Callable[[str], dict[str, Any]] = lambda _: {},
    ) -> Step:
        """Run a command, unless it was done and what it `made` is still there.

        Args:
            name: of the step.
            command: program and arguments.
            made: a file or directory that later steps need.
            result: what to keep of it, of its standard output.
        """
        if name in self._done and (made is None or made.exists()):
            print(f"-- {name}: done before", flush=True)
            self.all.append(self._done[name])
            return self._done[name]
        words = [str(word) for word in command]
        print(f"\n$ {shlex.join(words)}", flush=True)
        code, seconds, memory, out, text = _run(words)
        lines = [line for line in text.splitlines() if line.strip()]
        step = Step(name, shlex.join(words), "", seconds, memory, "\n".join(lines[-4:]))
        if code:
            reason = lines[-1] if lines else f"exit code {code}"
            return self._add(dataclasses.replace(step, failed=reason))
        return self._add(dataclasses.replace(step, result=result(out)))

    def _add(self, step: Step) -> Step:
        if not step.failed:
            fields = dataclasses.asdict(step)
            self._journal.append([{"path": fields.pop("name"), **fields}])
            self._done[step.name] = step
        self.all.append(step)
        outcome = step.failed or f"{step.seconds:.1f} s, {step.memory / 1e9:.1f} GB"
        print(f"-- {step.name}: {outcome}", flush=True)
        return step


def _run(words: list[str]) -> tuple[int, float, int, str, str]:
    """Exit code, seconds, peak memory, standard output, and all output, which is shown too."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, text=True
        )
        try:
            code, memory = _wait(process)
        except BaseException:
            process.kill()
            with contextlib.suppress(ChildProcessError):
                process.wait()
            raise
        seconds = time.perf_counter() - begun
        for file in (out, errors):
            file.seek(0)
        printed, said = out.read(), errors.read()
    print(printed, end="", flush=True)
    print(said, end="", file=sys.stderr, flush=True)
    return code, seconds, memory, printed, printed + said


def _wait(process: subprocess.Popen[str]) -> tuple[int, int]:
    if not hasattr(os, "wait4"):
        return process.wait(), 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

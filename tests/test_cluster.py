"""Many pictures through Ray: the lines of a single process, whatever is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest
from batch_runs import command, processes_of, read, wait_for
from conftest import ROOT, run_program
from PIL import Image

from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.language import GenerationOptions
from blip2.many.work import Answered, Start, Work

pytest.importorskip("ray", reason="a cluster needs: pip install -r requirements-ray.txt")

from blip2.many import actor, cluster

# Several clusters at once would wait for one another's processors.
pytestmark = pytest.mark.xdist_group("ray")


# Loaded by every Python of a test: a picture of that size ends the process that decodes it, as one
# would for which memory does not suffice.
DEADLY = """
import os, signal
from PIL import Image
resize = Image.Image.resize
def deadly(self, *arguments, **options):
    if self.size == (13, 7):
        os.kill(os.getpid(), signal.SIGKILL)
    return resize(self, *arguments, **options)
Image.Image.resize = deadly
"""


@pytest.fixture
def marker():
    """A variable for the environment of a test's processes; those that are left over are killed."""
    marker = f"RAY_TEST={uuid.uuid4().hex}"
    yield marker
    for pid in processes_of(marker):
        os.kill(pid, signal.SIGKILL)


def environment(marker: str) -> dict[str, str]:
    """With a token of the test's own: Ray's clusters ask for one."""
    name, value = marker.split("=")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": value[:32]}
    return {**os.environ, **token, name: value}


def actors_of(marker: str) -> list[int]:
    """The processes of a run's actors that hold engines."""
    return [pid for pid in processes_of(marker) if b"Engines" in name_of(pid)]


def ours(marker: str) -> list[int]:
    """The processes of a run that are not Ray's agents, which may take a minute to notice its end."""
    return [pid for pid in processes_of(marker) if b"Agent" not in name_of(pid)]


def name_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclasses.dataclass
class Begun:
    """A sampled run, where batches show, that one process began; another is to end it."""

    expected: bytes
    output: Path
    arguments: list[str]
    directory: Path

    def lines(self) -> int:
        return self.output.read_bytes().count(b"\n")

    def start(self, marker: str, *ray: object, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, ROOT / "run.py", *self.arguments, *map(str, ray), "--ray_actors", "2"],
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(marker) | variables,
        )

    def wait_for_lines(self, process: subprocess.Popen) -> None:
        before = self.lines()
        assert wait_for(lambda: self.lines() > before or process.poll() is not None, 150)
        assert process.poll() is None, process.communicate()[1].decode()


def begin(demo_opt: Path, photos: Path, tmp_path: Path, copies: int, **variables: str) -> Begun:
    """The folder `copies` times over, behind it one that is none, a deadly one and a shard."""
    wds = pytest.importorskip("webdataset")
    bad = tmp_path / "bad.png"
    bad.write_text("<html>")
    Image.new("RGB", (13, 7)).save(tmp_path / "deadly.png")
    with wds.TarWriter(str(tmp_path / "shard.tar")) as shard:
        for key in "abc":
            shard.write({"__key__": key, "png": (photos / "b" / "1.png").read_bytes()})
    sources = (photos, bad, tmp_path / "deadly.png", tmp_path / "shard.tar", *[photos] * copies)
    sampling = ("--top_p", 0.9, "--temperature", 3.0, "--seed", 3, "--batch_size", 2)
    arguments = ("--input_dir", *sources, *sampling, "--max_output_len", 16)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    done = run_program(*command(demo_opt, whole, *arguments), **variables)
    assert done.returncode == 1, done.stderr
    assert len(read(whole)) == 9 + 1 + 1 + 3 + 9 * copies
    expected = whole.read_bytes()
    # Half of a batch and half of a line, as a killed run leaves them.
    head = b"".join(expected.splitlines(keepends=True)[:7])
    output.write_bytes(head + expected[len(head) :][:20])
    shutil.copy(f"{whole}.options", f"{output}.options")
    # The workers import nothing of what lies where the run was started.
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2" / "__init__.py").touch()
    return Begun(expected, output, command(demo_opt, output, *arguments)[1:], tmp_path)


@pytest.fixture
def begun(demo_opt, photos, tmp_path) -> Begun:
    return begin(demo_opt, photos, tmp_path, 8)


def start_node(marker: str, *arguments: str, **variables: str) -> str:
    """A machine of a cluster, as `ray start` makes it; returns what that says."""
    started = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1"),
            *("--node-ip-address=127.0.0.1", "--disable-usage-stats", *arguments),
        ],
        env=environment(marker) | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 0, started.stderr
    return started.stdout + started.stderr


def start_head(marker: str, *arguments: str, **variables: str) -> str:
    """The address of a new cluster."""
    arguments = ("--head", "--port=0", "--include-dashboard=false", *arguments)
    return re.search(r"--address='(\S+:\d+)'", start_node(marker, *arguments, **variables))[1]


def test_the_lines_are_those_of_one_process_though_an_actor_is_killed(begun, marker):
    process = begun.start(marker, "--ray")
    begun.wait_for_lines(process)
    kill([random.choice(actors_of(marker))])
    printed, errors = process.communicate(timeout=150)
    assert process.returncode == 1, errors.decode()
    assert begun.output.read_bytes() == begun.expected
    assert b"86 pictures done, 1 of them failed; 79 in this run by 2 workers" in printed
    assert b"Traceback" not in errors
    assert errors.count(b"note: an actor was lost") == 1
    assert wait_for(lambda: not ours(marker), 20)


@pytest.mark.slow
def test_runs_that_are_killed_go_on_in_another_cluster(begun, marker):
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)):
        process = begun.start(marker, "--ray")
        begun.wait_for_lines(process)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors.decode()
        assert b"Traceback" not in errors
        assert wait_for(lambda: not ours(marker), 20)
        written = begun.output.read_bytes()
        assert begun.expected.startswith(written)
        assert written != begun.expected
    address = start_head(marker, "--num-cpus=2")
    process = begun.start(marker, "--ray", address)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 1, errors.decode()
    assert begun.output.read_bytes() == begun.expected
    # What could not be read is asked about again, and no other line changes.
    bad = begun.output.parent / "bad.png"
    Image.new("RGB", (9, 9)).save(bad)
    process = begun.start(marker, "--ray", address, "--retry_errors")
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors.decode()
    before, after = (
        content.splitlines() for content in (begun.expected, begun.output.read_bytes())
    )
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    [(old, new)] = changed
    assert b'"error"' in old
    assert b'"answer"' in new


@pytest.fixture
def deadly(tmp_path) -> dict[str, str]:
    """Variables under which a picture kills who decodes it."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(DEADLY)
    return {"PYTHONPATH": str(tmp_path / "python")}


@pytest.mark.slow
def test_a_machine_that_is_lost_and_a_picture_that_kills(
    demo_opt, photos, tmp_path, marker, deadly
):
    """Of two machines one goes; without Ray the deadly picture has the same line, which names it."""
    begun = begin(demo_opt, photos, tmp_path, 20, **deadly)
    [line] = [line for line in begun.expected.splitlines() if b"has ended each of the 3" in line]
    assert b"deadly.png" in line
    address = start_head(marker, **deadly)
    start_node(f"{marker}-b", f"--address={address}", **deadly)
    process = begun.start(marker, "--ray", address)
    assert wait_for(lambda: len(actors_of(f"{marker}-b")) == 1, 60)
    begun.wait_for_lines(process)
    time.sleep(1)
    kill(processes_of(f"{marker}-b"))
    printed, errors = process.communicate(timeout=150)
    assert process.returncode == 1, errors.decode()
    assert begun.output.read_bytes() == begun.expected
    assert b"2 of them failed" in printed
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_nothing_is_lost_or_there_twice_whatever_is_killed_when(
    demo_opt, photos, tmp_path, marker, deadly
):
    """At random moments: actors, processes that decode, a machine that comes back, and the run."""
    begun = begin(demo_opt, photos, tmp_path, 200, **deadly)
    address = start_head(marker, **deadly)
    start_node(f"{marker}-b", f"--address={address}", **deadly)
    victims = ["actor", "decoder", "actor", "machine", "decoder", "run", "actor", "decoder"]
    process = begun.start(marker, "--ray", address)
    done = []
    for victim in random.sample(victims, len(victims)):
        begun.wait_for_lines(process)
        time.sleep(random.random())
        if victim == "actor":
            kill(random.sample(actors_of(marker), 1))
        elif victim == "decoder":
            kill(random.sample(decoders_of(marker), 1))
        elif victim == "machine":
            kill(processes_of(f"{marker}-b"))
            start_node(f"{marker}-b", f"--address={address}", **deadly)
        else:
            kill([process.pid])
            process.wait()
            process = begun.start(marker, "--ray", address)
        done.append((victim, begun.lines()))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, (done, errors.decode())
    assert begun.output.read_bytes() == begun.expected, done
    assert b"Traceback" not in errors


def decoders_of(marker: str) -> list[int]:
    return [pid for pid in processes_of(marker) if b"spawn_main" in name_of(pid)]


def fake_engines(directory: Path, dies: str):
    """Engines that answer without any; they end as if killed, where `dies` says, once or always.

    "in block 1" is once, behind two of its batches; "at block 1" is whenever they get to it.
    """

    class FakeEngines:
        def open(self, *_arguments):
            if dies == "opening":
                os._exit(1)
            self.batches = []
            return "facts"

        def begin(self, _work):
            pass

        def exchange(self, batches, is_all):
            self.batches += batches
            if not is_all and len(self.batches) < 2:
                return actor.Report([], 2)
            if not self.batches:
                return actor.Report([], 2)
            batch = self.batches.pop(0)
            if dies == "in block 1" and batch.position == 12:
                with contextlib.suppress(FileExistsError):
                    (directory / "died").touch(exist_ok=False)
                    os._exit(1)
            if dies == "at block 1" and batch.position == 8:
                os._exit(1)
            lines = [[picture.name] for picture in batch.pictures]
            return actor.Report([Answered(batch.position, lines, {})], 1)

    return FakeEngines


@pytest.mark.parametrize(
    "dies, message",
    [
        ("in block 1", None),
        pytest.param(
            "at block 1",
            "each of 3 actors was lost that answered the pictures from 8.png to 15.png",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "opening",
            "every actor was lost 3 times before it answered anything",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_blocks_of_lost_actors_begin_anew(tmp_path, monkeypatch, capfd, dies, message):
    """Blocks of four batches: what came of one before its actor was lost is not there twice."""
    monkeypatch.setattr(cluster, "Engines", fake_engines(tmp_path, dies))
    names = [f"{number}.png" for number in range(61)]
    work = Work(names, Start(), 2, Preprocessing(4, 4), [], GenerationOptions(end_id=0), block=4)
    answered: list[str] = []

    def run() -> None:
        with cluster.Cluster("local", 2) as machines:
            assert machines.open(None, [], {}) == "facts"
            for batch in machines.answer(work):
                answered.extend(line["path"] for [line] in batch.lines)

    if message is None:
        run()
        assert answered == names
        assert capfd.readouterr().err.count("note: an actor was lost") == 1
    else:
        with pytest.raises(Blip2Error, match=message):
            run()
        assert answered == names[: 8 * (dies == "at block 1")]


def test_what_is_wrong_on_another_machine_is_one_sentence(tmp_path, monkeypatch):
    """The actors by themselves: what cannot be done there comes back as the run's error."""
    monkeypatch.chdir(tmp_path)  # they change directory, and their process's name
    main = types.ModuleType("__main__")
    main.__file__ = "pytest"
    monkeypatch.setitem(sys.modules, "__main__", main)

    def fail() -> None:
        raise Blip2Error("no engine there")

    engines = actor.Engines()
    here, elsewhere = str(tmp_path), str(tmp_path / "absent")
    assert str(engines.open(here, fail, 1, [], {})) == "no engine there"
    assert str(engines.open(elsewhere, fail, 1, [], {})).endswith(
        "absent (No such file or directory); start the run in a directory that all machines of the"
        " cluster share"
    )


def test_more_actors_than_the_cluster_has_room_for_are_refused(photos, demo_opt, tmp_path):
    done = run_program(
        *command(demo_opt, tmp_path / "out.jsonl", "--input_dir", photos, "--ray"),
        *("--ray_actors", "5000"),
    )
    assert done.returncode == 2
    assert re.search(r"--ray_actors is 5000, more than the cluster's \d+ processor", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_address_without_a_cluster_is_refused(photos, demo_opt, tmp_path):
    address = "127.0.0.1:1"
    done = run_program(
        *command(demo_opt, tmp_path / "out.jsonl", "--input_dir", photos, "--ray", address)
    )
    assert done.returncode == 2
    assert f"cannot join a Ray cluster at {address}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

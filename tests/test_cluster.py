"""Many pictures through Ray: the lines of a single process, whatever is killed."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from batch_runs import command, processes_of, read, wait_for
from conftest import ROOT, run_program
from PIL import Image

from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.language import GenerationOptions
from blip2.many.batch import Batch, Question, Start, Work
from blip2.many.inputs import Picture

pytest.importorskip("ray.data", reason="a cluster needs: pip install -r requirements-ray.txt")

from blip2.many import cluster

# Several clusters at once would wait for one another's processors.
pytestmark = pytest.mark.xdist_group("ray")


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
    return [pid for pid in processes_of(marker) if b"MapWorker" in name_of(pid)]


def name_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@dataclasses.dataclass
class Begun:
    """A sampled run, where batches show, that one process began; another is to end it."""

    expected: bytes
    output: Path
    arguments: list[str]
    directory: Path

    def lines(self) -> int:
        return self.output.read_bytes().count(b"\n")

    def start(self, marker: str, *ray: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, ROOT / "run.py", *self.arguments, *map(str, ray), "--ray_actors", "2"],
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(marker),
        )

    def wait_for_lines(self, process: subprocess.Popen) -> None:
        before = self.lines()
        assert wait_for(lambda: self.lines() > before or process.poll() is not None, 150)
        assert process.poll() is None, process.communicate()[1].decode()


@pytest.fixture
def begun(demo_opt, photos, tmp_path) -> Begun:
    wds = pytest.importorskip("webdataset")
    bad = tmp_path / "bad.png"
    bad.write_text("<html>")
    with wds.TarWriter(str(tmp_path / "shard.tar")) as shard:
        for key in "abc":
            shard.write({"__key__": key, "png": (photos / "b" / "1.png").read_bytes()})
    sources = (photos, bad, tmp_path / "shard.tar", *[photos] * 8)
    sampling = ("--top_p", 0.9, "--temperature", 3.0, "--seed", 3, "--batch_size", 2)
    arguments = ("--input_dir", *sources, *sampling, "--max_output_len", 16)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    done = run_program(*command(demo_opt, whole, *arguments))
    assert done.returncode == 1, done.stderr
    assert len(read(whole)) == 9 + 1 + 3 + 72
    expected = whole.read_bytes()
    # Half of a batch and half of a line, as a killed run leaves them.
    head = b"".join(expected.splitlines(keepends=True)[:7])
    output.write_bytes(head + expected[len(head) :][:20])
    shutil.copy(f"{whole}.options", f"{output}.options")
    # The workers import nothing of what lies where the run was started.
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2" / "__init__.py").touch()
    return Begun(expected, output, command(demo_opt, output, *arguments)[1:], tmp_path)


def test_the_lines_are_those_of_one_process_though_an_actor_is_killed(begun, marker):
    process = begun.start(marker, "--ray")
    begun.wait_for_lines(process)
    os.kill(random.choice(actors_of(marker)), signal.SIGKILL)
    printed, errors = process.communicate(timeout=150)
    assert process.returncode == 1, errors.decode()
    assert begun.output.read_bytes() == begun.expected
    assert b"85 pictures done, 1 of them failed; 78 in this run by 2 workers" in printed
    assert b"Traceback" not in errors
    assert wait_for(lambda: not processes_of(marker), 20)


@pytest.mark.slow
def test_runs_that_are_killed_go_on_in_another_cluster(begun, marker):
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)):
        process = begun.start(marker, "--ray")
        begun.wait_for_lines(process)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors.decode()
        assert b"Traceback" not in errors
        assert wait_for(lambda: not processes_of(marker), 20)
        written = begun.output.read_bytes()
        assert begun.expected.startswith(written)
        assert written != begun.expected
    started = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"),
            "--disable-usage-stats",
        ],
        cwd=begun.output.parent,
        env=environment(marker),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 0, started.stderr
    address = re.search(r"--address='(\S+:\d+)'", started.stdout + started.stderr)[1]
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


def test_what_is_wrong_on_another_machine_is_one_sentence(tmp_path, monkeypatch):
    """The stages by themselves: what cannot be done there comes back as the run's error."""
    monkeypatch.chdir(tmp_path)  # the stages change directory

    def fail() -> None:
        raise Blip2Error("no engine there")

    here, elsewhere = str(tmp_path), str(tmp_path / "absent")
    picture = Batch(0, [Picture("a.png")], ["a.png does not exist"])
    row = cluster._packed(picture)
    options = GenerationOptions(end_id=0)
    work = Work([str(tmp_path / "s.tar")], Start(), 2, Preprocessing(4, 4), [], options)
    rows = {"content": [pickle.dumps(work)]}
    for message, made in {
        "cannot enter": cluster._decode(row, elsewhere, Preprocessing(4, 4)),
        "cannot enter .*absent": cluster._facts(elsewhere, fail, [], {}),
        "no engine there": cluster._facts(here, fail, [], {}),
        "no engine": cluster._Answerer(here, fail, [Question("", "")], options)(row),
        "start the run in": cluster._Answerer(elsewhere, fail, [], options)(row),
        "all machines": {"content": next(cluster._read(rows, elsewhere))["content"][0]},
    }.items():
        with pytest.raises(Blip2Error, match=message):
            cluster._unpacked(made)
        # Later stages hand it on.
        for later in (
            cluster._decode(made, here, Preprocessing(4, 4)),
            cluster._Answerer(here, lambda: None, [], options)(made),
        ):
            with pytest.raises(Blip2Error, match=message):
                cluster._unpacked(later)


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

"""Shards, pictures and outputs in a real object store: moto's server of S3, on this machine."""

from __future__ import annotations

import http.server
import json
import os
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_runs import command, read, scene, wait_for
from conftest import run_program, start_program

from blip2 import remote
from blip2.errors import Blip2Error
from blip2.many import inputs
from demo import scenes

s3fs = pytest.importorskip("s3fs", reason="pip install -r requirements-test.txt")
moto = pytest.importorskip("moto.server", reason="pip install -r requirements-test.txt")
SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def store() -> Iterator[s3fs.S3FileSystem]:
    """A bucket with two shards and two pictures; programs find it by the usual variables."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    filesystem.mkdir("photos")
    yield filesystem
    server.stop()
    patch.undo()


@pytest.fixture(scope="module")
def files(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(8):
        scene(number).image.save(folder / f"{number}.png")
    for shard, numbers in ((0, (0, 1, 2)), (1, (3, 4, 5))):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as writer:
            for number in numbers:
                writer.add(folder / f"{number}.png", f"{number}.png")
        store.put_file(str(folder / f"s-{shard}.tar"), f"photos/in/s-{shard}.tar")
    for number in (6, 7):
        store.put_file(str(folder / f"{number}.png"), f"photos/more/{number}.png")
    store.pipe_file("photos/more/notes.txt", b"nothing")
    return folder


def captions(count: int = 8) -> list[str]:
    return [scenes.caption(scene(number)) for number in range(count)]


SOURCES = ("s3://photos/in/s-{0..1}.tar", "s3://photos/more/")


def run(opt, folder: Path, output: str, *arguments: object, sources=SOURCES):
    """In a folder, where the journal is."""
    asked = command(opt, Path("x"), "--input_dir", *sources, "--batch_size", 2, *arguments)
    asked[asked.index("x")] = output
    return run_program(*asked, cwd=folder)


def test_pictures_of_a_store_are_found_and_read(files):
    entries = inputs.list_entries([*SOURCES, "s3://photos/more/*.png"])
    names = ["in/s-0.tar", "in/s-1.tar", *["more/6.png", "more/7.png"] * 2]
    assert entries == [f"s3://photos/{name}" for name in names]
    pictures = list(inputs.read_pictures(entries[:3]))
    assert [picture.key for picture in pictures] == [*(f"{n}.png" for n in range(6)), None]
    assert [p.read() for p in pictures[:6]] == [(files / p.key).read_bytes() for p in pictures[:6]]
    assert remote.read(entries[2], 1 << 20) == (files / "6.png").read_bytes()
    assert inputs.count_pictures(entries) is None
    with pytest.raises(Blip2Error, match="is larger than 0 MiB"):
        remote.read(entries[2], 10)
    [broken] = inputs.read_pictures(["s3://photos/in/s-9.tar"])
    assert "s-9.tar is damaged" in broken.error


@pytest.mark.parametrize(
    "form",
    [
        "x.jsonl",
        pytest.param("x.parquet", marks=pytest.mark.slow),
        pytest.param("x.csv", marks=pytest.mark.slow),
        pytest.param("x.tar", marks=pytest.mark.slow),
    ],
)
def test_outputs_in_a_store_are_those_of_a_disk(demo_opt, store, files, tmp_path, form):  # noqa: ARG001
    """Killed once on the way, and gone on with."""
    if form == "x.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "here").mkdir()
    more = ("--shard_size", 3) if form == "x.tar" else ()
    more += ("--min_score", "-9")
    done = run(demo_opt, tmp_path / "here", str(tmp_path / "disk" / form), *more)
    assert done.returncode == 0, done.stderr
    url = f"s3://photos/{form}-out/{form}"
    asked = command(demo_opt, Path("x"), "--input_dir", *SOURCES, "--batch_size", 2, *more)
    asked[asked.index("x")] = url
    process = start_program(*asked, cwd=tmp_path / "here")
    journal = tmp_path / "here" / f"{form}.journal"
    assert wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3, 60)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    done = run(demo_opt, tmp_path / "here", url, *more)
    assert done.returncode == 0, done.stderr
    store.invalidate_cache()
    names = [name for name in os.listdir(tmp_path / "disk") if ".journal" not in name]
    assert len(names) == (4 if form == "x.tar" else 2)
    for name in names:
        found = store.cat_file(f"photos/{form}-out/{name}")
        assert found == (tmp_path / "disk" / name).read_bytes(), name
    if form == "x.jsonl":
        lines = [
            json.loads(line) for line in store.cat_file("photos/x.jsonl-out/x.jsonl").splitlines()
        ]
        assert [line["answer"] for line in lines] == captions()
        assert lines[0]["path"] == "s3://photos/in/s-0.tar"
    # Nothing that was written or said has the secret.
    assert SECRET not in done.stdout + done.stderr
    for path in (tmp_path / "here").iterdir():
        assert SECRET.encode() not in path.read_bytes()
    assert not list((tmp_path / "here").glob("*.part"))


def test_what_others_put_there_is_not_replaced(demo_opt, store, files, tmp_path):  # noqa: ARG001
    store.pipe_file("photos/mine/x.csv", b"mine")
    done = run(demo_opt, tmp_path, "s3://photos/mine/x.csv")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "s3://photos/mine/x.csv exists and has no x.csv.journal" in done.stderr
    assert store.cat_file("photos/mine/x.csv") == b"mine"


@pytest.mark.parametrize(
    ("sources", "output", "says"),
    [
        (["s3://nowhere/*.tar"], "x.jsonl", "s3://nowhere/\\*.tar"),
        (["s3://photos/in/"], "s3://photos/out/", "is a folder in an object store"),
        (["s3://me:pw@photos/a.tar"], "s3://photos/x.csv", "photos/a.tar is given with a query"),
        (["nosuch://photos/a/"], "x.jsonl", "nosuch://photos/a/ cannot be opened"),
        (["s3://photos/more/none*"], "x.jsonl", "holds no picture"),
        (["s3://photos/more/"], "s3://nowhere/x.csv", "nowhere"),
    ],
)
def test_what_is_wrong_is_a_line(demo_opt, files, tmp_path, sources, output, says):  # noqa: ARG001
    done = run(demo_opt, tmp_path, output, sources=sources)
    assert done.returncode in (1, 2)
    text = done.stderr if done.returncode == 2 else (tmp_path / output).read_text()
    assert says.replace("\\", "") in text
    assert "Traceback" not in done.stderr
    assert "pw" not in done.stderr + done.stdout


def test_a_shard_on_a_web_server(demo_opt, files, tmp_path):
    def handler(*arguments):
        return http.server.SimpleHTTPRequestHandler(*arguments, directory=str(files))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/s-{{0..1}}.tar"
    done = run(demo_opt, tmp_path, "x.jsonl", sources=[url])
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert [line["answer"] for line in read(tmp_path / "x.jsonl")] == captions(6)

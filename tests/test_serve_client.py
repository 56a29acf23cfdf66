"""run.py --server: the same answers as with engines of its own, without importing torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from batch_runs import read, scene, wait_for
from conftest import ROOT, run_program
from serving_runs import CAPTION, KEY, question

pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")

from blip2.language import GenerationOptions
from blip2.serving import chat, client
from blip2.serving.chat import Bounds

pytestmark = pytest.mark.xdist_group("serve")

SCENE = ROOT / "demo" / "scene.png"
ENGINES = ("--engine_dir", "demo/checkpoint", "--opt_engine_dir", "demo/checkpoint")


def ask(server, *arguments, key: str = KEY):
    return run_program("run.py", "--server", server.url, *arguments, BLIP2_API_KEY=key)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input_text", ""],
        ["--input_text", "What colour is the circle?", "--num_beams", "3"],
        ["--input_text", "a small red", "--prompt_template", "{}", "--max_output_len", "5"],
        ["--input_text", "", "--temperature", "3", "--seed", "4", "--max_output_len", "8"],
        ["--input_text", "", "--top_p", "1", "--seed", "5", "--max_output_len", "8"],
        ["--input_text", "", "--top_k", "1"],
        ["--num_beams", "2", "--length_penalty", "2", "--repetition_penalty", "1.5"],
    ],
)
def test_answers_are_those_of_its_own_engines(server, arguments):
    own = run_program("run.py", *ENGINES, "--input_dir", SCENE, "--json", *arguments)
    served = ask(server, "--input_dir", SCENE, "--json", *arguments)
    assert served.returncode == 0, served.stderr
    one, other = json.loads(own.stdout), json.loads(served.stdout)
    assert one["prompt"] == other["prompt"]
    for mine, theirs in zip(one["answers"][0], other["answers"][0], strict=True):
        assert (mine["text"], mine["flags"]) == (theirs["text"], theirs["flags"])
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
    assert {"start", "load picture", "decode", "wait", "OPT"} <= set(other["seconds"])
    assert sum(other["seconds"].values()) <= other["total_seconds"]


def test_sampling_is_what_it_is_without_a_server():
    """There any of its three flags means sampling; a server takes top_p 1 for no wish at all."""
    body = {"messages": question()["messages"]}
    bounds = Bounds("blip2", max_beams=10, max_output_len=64, takes_urls=False)
    none = {"max_output_len": 30, "num_beams": 1, "seed": 7}
    for given, samples in (({}, False), ({"top_p": 1.0}, True), ({"temperature": 1.0}, True)):
        fields = client._fields({**none, "top_k": None, **given})
        parsed = chat.parse(json.dumps({**body, **fields}).encode(), bounds)
        options = GenerationOptions(end_id=0, **parsed.question.options)
        assert options.samples == samples
        assert options.seed == (7 if samples else 0)
        assert options.max_output_len == 30


def test_it_prints_as_run_py_does(server):
    done = ask(server, "--input_dir", SCENE, "--input_text", "What colour is the circle?")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["[Q] Question: What colour is the circle? Answer:", "[A] red"]
    assert lines[3].split() == ["stage", "time", "share"]
    assert [line.split()[0] for line in lines[-2:]] == ["other", "total"]


@pytest.mark.parametrize("many", [False, True])
def test_nothing_of_it_imports_torch(server, many, tmp_path):
    """Which takes seconds on a machine with a GPU; nor, for one picture, numpy and Pillow."""
    output = ["--output", tmp_path / "out.jsonl"] if many else []
    done = subprocess.run(
        [
            *(sys.executable, "-X", "importtime", "run.py", "--server", server.url),
            *("--input_dir", SCENE, "--input_text", "", *output),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "BLIP2_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "blip2.serving.client" in imported
    heavy = {"torch", "transformers", "tokenizers", "onnx", "onnxruntime", "uvicorn"}
    assert not imported & (heavy if many else heavy | {"numpy", "PIL"})


def test_many_pictures_are_the_lines_of_its_own_engines(server, photos, tmp_path):
    (photos / "b" / "0.bad.png").write_bytes(b"no picture")
    try:
        questions = ("--input_text", "", "--input_text", "What colour is the circle?")
        common = ("--input_dir", photos, *questions, "--max_output_len", "40")
        own = run_program(
            "run.py", *ENGINES, *common, "--workers", "1", "--output", tmp_path / "own.jsonl"
        )
        served = ask(server, *common, "--workers", "3", "--output", tmp_path / "served.jsonl")
    finally:
        (photos / "b" / "0.bad.png").unlink()
    assert (own.returncode, served.returncode) == (1, 1), (own.stderr, served.stderr)
    assert "10 pictures done, 1 of them failed; 10 in this run" in served.stdout
    one, other = read(tmp_path / "own.jsonl"), read(tmp_path / "served.jsonl")
    assert len(one) == len(other) == 19
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        if "error" in theirs:
            assert "none of the formats" in theirs["error"]
            mine["error"] = theirs["error"]
        assert mine == theirs


def test_a_run_that_was_killed_is_gone_on_with(server, tmp_path):
    for number in range(40):
        picture = tmp_path / "photos" / f"{number:02}.png"
        picture.parent.mkdir(exist_ok=True)
        scene(number % 9).image.save(picture)
    with client.Client(server.url, KEY) as asking:
        fingerprint = asking.model()["fingerprint"]
    output = tmp_path / "out.jsonl"
    command = ["--server", server.url, "--input_dir", tmp_path / "photos", "--output", output]
    command += ["--workers", "2", "--temperature", "2", "--seed", "3", "--max_output_len", "8"]
    with server.slowly():
        process = subprocess.Popen(
            [sys.executable, "run.py", *map(str, command)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "BLIP2_API_KEY": KEY},
        )
        assert wait_for(lambda: output.exists() and len(read_whole(output)) >= 4, 30)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = read_whole(output)
    options = json.loads((tmp_path / "out.jsonl.options").read_text())
    assert options["--server, or its engines"] == fingerprint
    assert 4 <= len(kept) < 40
    done = run_program("run.py", *command, BLIP2_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert f"; {40 - len(kept)} in this run" in done.stdout
    whole = tmp_path / "whole.jsonl"
    command[command.index(output)] = whole
    assert run_program("run.py", *command, BLIP2_API_KEY=KEY).returncode == 0
    assert output.read_text() == whole.read_text()
    command[command.index(whole)] = output
    other = run_program("run.py", *command, "--num_beams", "1", "--seed", "9", BLIP2_API_KEY=KEY)
    assert other.returncode == 2
    assert "was begun with another --seed" in other.stderr


def read_whole(output) -> list[dict]:
    lines = output.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize(
    "arguments, key, says",
    [
        (["--input_dir", SCENE], "other", "wants its API key; set BLIP2_API_KEY"),
        (["--input_dir", "nowhere.png"], KEY, "picture nowhere.png does not exist"),
        (["--input_dir", "image.pt"], KEY, "image.pt is a tensor; give --input_dir a picture"),
        ([], KEY, "with --server give --input_dir the picture"),
        (["--input_dir", SCENE, "--engine_dir", "x"], KEY, "--engine_dir goes without --server"),
        (["--input_dir", ROOT / "README.md"], KEY, "says: the picture is in none of the formats"),
        (["--input_dir", SCENE, "--num_beams", "99"], KEY, "num_beams must be a whole number from"),
        (
            ["--input_dir", SCENE, "--input_text", "x " * 99],
            KEY,
            "the question has too many tokens",
        ),
        (["--input_dir", SCENE, "--max_txt_len", "3"], KEY, "the question has too many tokens"),
        (["--input_dir", ROOT / "demo"], KEY, "is not a file"),
        (["--input_dir", SCENE, "--server", "ftp://x"], KEY, "is not the address of a server"),
        (["--input_dir", SCENE, "--server", "http://127.0.0.1:9"], KEY, "start a server there"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(server, arguments, key, says):
    done = ask(server, *arguments, key=key)
    assert done.returncode == 2, done.stdout
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_lines_can_be_printed(server):
    done = ask(server, "--input_dir", SCENE, "--output", "-")
    [line] = done.stdout.splitlines()
    assert json.loads(line) == {
        "path": str(SCENE),
        "question": "",
        "answer": CAPTION,
        "flags": [],
    }

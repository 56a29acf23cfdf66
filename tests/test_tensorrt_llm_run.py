"""run.py with a TensorRT-LLM engine (a double of it), alone and as one of several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT
from trtllm_engines import DOUBLES, forget_double, install_double, install_metadata, write_engine

from blip2 import cli
from blip2.programs import run

QUESTION = "Question: what is it? Answer:"
BEAMS = ("--num_beams", "3", "--length_penalty", "0.5", "--max_output_len", "12")


@pytest.fixture(scope="module")
def truth(tiny_export, tmp_path_factory) -> Path:
    """The language model of the tiny BLIP-2, by itself."""
    directory = tmp_path_factory.mktemp("language_model")
    tiny_export.model.language_model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def arguments(tiny_export):
    """The command line that asks with an OPT."""
    out = tiny_export.output

    def arguments(opt_engine_dir, *more) -> list[str]:
        return [
            *("run.py", "--opt_engine_dir", str(opt_engine_dir), "--json", *BEAMS),
            *("--engine_dir", str(out / "onnx"), "--query_tokens", str(out / "query_tokens.pt")),
            *("--input_dir", str(out / "image.pt"), "--input_text", QUESTION, *map(str, more)),
        ]

    return arguments


@pytest.fixture
def ask(arguments, monkeypatch, tmp_path, capsys):
    """Run run.py's main with the double, as process `rank` of `size`; code, output, errors."""

    def ask(opt_engine_dir, *more, rank=0, size=1):
        install_double(monkeypatch, tmp_path / "site", rank=rank, size=size)
        monkeypatch.setattr(sys, "argv", arguments(opt_engine_dir, *more))
        with pytest.raises(SystemExit) as stopped:
            cli.run(run.main)
        return stopped.value.code, *capsys.readouterr()

    yield ask
    forget_double()


def check_same_answers(printed: str, expected: str) -> None:
    found, right = (json.loads(text)["answers"] for text in (printed, expected))
    assert [[beam["text"] for beam in beams] for beams in found] == [
        [beam["text"] for beam in beams] for beams in right
    ]
    scores, right = ([beam["score"] for beam in answers[0]] for answers in (found, right))
    assert scores == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("kv_cache_type", ["PAGED", "CONTINUOUS"])
@pytest.mark.parametrize("size", [1, 2])
def test_rank_0_answers_as_the_native_session_does(
    ask, tiny_opt, truth, tmp_path, kv_cache_type, size
):
    engine = write_engine(tmp_path / "engine", truth, kv_cache_type=kv_cache_type, world_size=size)
    native, done = ask(tiny_opt), ask(engine, size=size)
    assert (native[0], done[0]) == (0, 0), (native, done)
    check_same_answers(done[1], native[1])


def test_standard_output_is_one_json_object_and_nothing_else(arguments, truth, tmp_path):
    site = install_metadata(tmp_path / "site", "1.2.1")
    done = subprocess.run(
        [sys.executable, *arguments(write_engine(tmp_path / "engine", truth))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (DOUBLES, site)))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["answers"][0]) == 3


def test_other_ranks_of_the_executor_need_neither_vit_nor_picture(ask, truth, tmp_path):
    engine = write_engine(tmp_path / "engine", truth, world_size=2)
    absent = tmp_path / "absent"
    code, out, err = ask(engine, "--engine_dir", absent, "--input_dir", absent, rank=1, size=2)
    assert (code, out) == (0, ""), err


def test_other_ranks_of_the_python_session_decode_silently(ask, truth, tmp_path):
    engine = write_engine(tmp_path / "engine", truth, world_size=2, kv_cache_type="CONTINUOUS")
    code, out, err = ask(engine, rank=1, size=2)
    assert (code, out) == (0, ""), err
    code, out, err = ask(engine, "--engine_dir", tmp_path / "absent", rank=1, size=2)
    assert (code, out) == (2, "")
    assert "absent" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_many_pictures_are_refused_where_every_process_would_write_them(
    tiny_export, truth, tmp_path, monkeypatch, capsys, rank
):
    """ModelRunner's processes all take the requests, and there is one output."""
    engine = write_engine(tmp_path / "engine", truth, world_size=2, kv_cache_type="CONTINUOUS")
    install_double(monkeypatch, tmp_path / "site", rank=rank, size=2)
    out, output = tiny_export.output, tmp_path / "out.jsonl"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("run.py", "--opt_engine_dir", str(engine), "--engine_dir", str(out / "onnx")),
            *("--query_tokens", str(out / "query_tokens.pt"), "--workers", "1"),
            *("--input_dir", str(tiny_export.picture), "--output", str(output)),
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        cli.run(run.main)
    forget_double()
    assert stopped.value.code == 2
    assert (
        "--output cannot be written by several processes; leave out mpirun"
        in capsys.readouterr().err
    )
    assert not output.exists()


def test_a_foreign_vocabulary_is_refused_before_the_engine_is_loaded(ask, truth, tmp_path):
    engine = write_engine(tmp_path / "engine", truth)
    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["vocab_size"] = 200
    (engine / "config.json").write_text(json.dumps(config))
    (engine / "rank0.engine").write_text("would not load")
    code, out, err = ask(engine)
    assert (code, out) == (2, "")
    assert "the tokenizer has 260 tokens, this OPT only 200" in err


@pytest.mark.parametrize("size, aborted", [(2, [2]), (1, [])])
def test_a_process_that_fails_ends_those_that_wait_for_it(
    ask, truth, tmp_path, monkeypatch, size, aborted
):
    """Without MPI's abort, its end waits for the other processes forever."""
    codes = []
    world = types.SimpleNamespace(Get_size=lambda: size, Abort=codes.append)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", types.SimpleNamespace(COMM_WORLD=world))
    engine = write_engine(tmp_path / "engine", truth, world_size=size)
    code, _, err = ask(engine, "--engine_dir", tmp_path / "absent", size=size)
    assert (code, codes) == (2, aborted)
    assert err.count("error:") == 1


def test_a_bug_in_one_process_of_several_shows_and_ends_the_others(monkeypatch, capsys):
    codes = []
    world = types.SimpleNamespace(Get_size=lambda: 2, Abort=codes.append)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", types.SimpleNamespace(COMM_WORLD=world))
    with pytest.raises(SystemExit):
        cli.run(lambda: 1 / 0)
    assert codes == [1]
    assert "ZeroDivisionError" in capsys.readouterr().err

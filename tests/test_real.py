"""bench.real: from a hub on this machine, whole or broken, to the report; how claims are judged."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import models
import pytest
from conftest import ROOT
from local_hub import LocalHub

from bench import real as program
from bench.published import pictures, source
from bench.published import steps as running
from blip2.checkpoints import hub as hub_files
from blip2.errors import Blip2Error

pytest.importorskip("skimage", reason="pip install -r requirements-real.txt")
DEMO = ROOT / "demo" / "checkpoint"
SCENE = ROOT / "demo" / "scene.png"
NAME = "somebody/blip2"
WEIGHTS, SMALL = "model.safetensors", "generation_config.json"


def started(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "bench.real", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the demo, which this process asks too."""
    constants = huggingface_hub.constants
    with LocalHub({NAME: DEMO}) as running:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running
    hub_files.locate.cache_clear()


@pytest.fixture
def fetch(hub, tmp_path):
    """Find, download and verify the repository: bytes to download, the directory, what was said."""

    def run() -> tuple[int, Path, str]:
        [name] = hub.repositories
        found = source.find(name)
        directory = found.fetch()
        return found.missing_bytes, directory, found.verify(directory, tmp_path / "verified.json")

    return run


def test_a_download_that_is_cut_goes_on_and_is_compared_with_the_hubs_hashes(
    hub, fetch, monkeypatch
):
    hub.faults.cut[WEIGHTS] = (11_000_000, 1)
    missing, directory, verified = fetch()
    wanted = hub_files.wanted(path.name for path in DEMO.iterdir())
    assert missing == sum((DEMO / name).stat().st_size for name in wanted)
    first, second = hub.downloads(WEIGHTS)
    assert first is None
    assert int(re.fullmatch(r"bytes=(\d+)-", second)[1]) > 10_000_000
    assert re.match(rf"{len(wanted)} files have the hub's hashes, commit \w{{40}}$", verified)
    for name in wanted:
        assert (directory / name).read_bytes() == (DEMO / name).read_bytes()

    hub.requests.clear()
    assert fetch() == (0, directory, verified)
    assert not hub.downloads(WEIGHTS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch() == (0, directory, "not compared with the hub's hashes")


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_a_download_that_ends_early_is_an_error_and_keeps_what_is_whole(
    hub, fetch, fault, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    hub.faults.cut[WEIGHTS] = (1000, 100)
    if fault == "short":
        hub.faults.cut.clear()
        hub.faults.short.add(WEIGHTS)
    with pytest.raises(
        Blip2Error, match=r"cannot be downloaded .*the same command goes on with it"
    ):
        fetch()
    hub.faults.cut.clear()
    hub.faults.short.clear()
    hub.requests.clear()
    fetch()
    assert hub.downloads(WEIGHTS) == [None]
    assert not hub.downloads("tokenizer.json")


@pytest.mark.parametrize("name, kind", [(WEIGHTS, "sha256"), (SMALL, "git-sha1")])
def test_a_file_that_came_damaged_is_removed_and_downloaded_again(hub, fetch, name, kind):
    hub.faults.flipped.add(name)
    with pytest.raises(Blip2Error) as caught:
        fetch()
    content = (DEMO / name).read_bytes()
    right = hashlib.sha256(content)
    if kind == "git-sha1":  # as git names a blob
        right = hashlib.sha1(b"blob %d\0" % len(content) + content)
    problem = f"{name} of {NAME} came damaged: its {kind} is"
    assert str(caught.value).startswith(problem)
    assert f"the hub's {right.hexdigest()[:12]}…; it was removed; the same" in str(caught.value)
    hub.faults.flipped.clear()
    hub.requests.clear()
    fetch()
    assert {one[1] for one in hub.requests if one[0] == "GET"} == {name}


def test_what_cannot_be_found_is_one_line(hub, tmp_path):
    done = started("--model_dir", "somebody/none", **hub.environment(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    expected = "error: somebody/none is no directory, and the hub cannot be asked for it (404"
    assert done.stderr.startswith(expected)
    assert done.stderr.endswith("copy the checkpoint here and give --model_dir its directory\n")


def test_without_its_picture_another_is_asked_for(tmp_path, monkeypatch):
    command = ["real", "--model_dir", DEMO, "--image", tmp_path / "no.png", "--directory", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(Blip2Error, match=r"no\.png.*; give `image` a picture of your own"):
        program.main()


def in_this_process(words: list[str]) -> tuple[int, float, int, str, str]:
    """What `steps._run` does, without other processes, which would import everything again.

    Exporting takes long, and is tested elsewhere: the checkpoint itself stands in for what it makes.
    """
    _, *arguments = words
    if arguments[0] == "onnx_export.py":
        export = Path(arguments[arguments.index("--output_dir") + 1])
        shutil.copytree(arguments[arguments.index("--model_dir") + 1], export)
        (export / "onnx").mkdir()
        return 0, 1.0, 10**9, "", "relative error 1e-2"
    if arguments[0] == "-m":
        arguments.pop(0)
        name = arguments[0]
    else:
        name = f"blip2.programs.{Path(arguments[0]).stem}"
    printed, before = io.StringIO(), sys.argv
    sys.argv, code = arguments, 0
    try:
        with contextlib.redirect_stdout(printed):
            importlib.import_module(name).main()
    except Exception:
        code = 1
        printed.write(traceback.format_exc())
    finally:
        sys.argv = before
    return code, 1.0, 10**9, printed.getvalue(), printed.getvalue()


@pytest.mark.usefixtures("hub")
def test_from_the_hub_to_the_report_and_on_where_it_was_ended(tmp_path, monkeypatch, capsys):
    made = tmp_path / "made"
    monkeypatch.setattr(running, "_run", in_this_process)
    command = ["real", "--model_dir", NAME, "--image", SCENE, "--directory", made]
    command += ["--pictures", 1, "--precision", "float16", "int4"]

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        assert program.main() in (0, 1)  # which is faster, is not for a test
        return capsys.readouterr().out

    printed = run(*command)
    began = [line.partition(":")[0] for line in printed.splitlines()[:3]]
    assert began == ["disk", "memory", "time"]
    text = (made / "report.md").read_text()
    assert re.match(rf"# {NAME}: \d+ claims pass, \d fail, \d not tried\n", text)
    check_claims(text, "float16", "int4")
    not_tried = "is converted, and answers, in int8 | not tried | not asked for |"
    assert not_tried in text
    for part in ("| torch |", "| astronaut: Question: what is the woman wearing? Answer: |"):
        assert part in text
    assert not list((made / "opt").iterdir())

    journal = made / "steps.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    names = [json.loads(line)["path"] for line in lines]
    journal.write_text("".join(lines[:-2]) + lines[-2][:30])
    again = run(*command)
    assert re.findall(r"^-- (.+?): done before$", again, re.MULTILINE) == names[:-2]
    assert [json.loads(line)["path"] for line in journal.read_text().splitlines()] == names
    check_claims((made / "report.md").read_text(), "float16", "int4")

    with pytest.raises(Blip2Error, match="was begun with another --image or --pictures"):
        run(*command, "--pictures", 2)


def check_claims(text: str, *precisions: str) -> None:
    """See in a report that what was tried has passed, but for which is faster."""
    for claim in (
        "onnx_export.py exports it",
        *(f"It is converted, and answers, in {precision}" for precision in precisions),
        "Pictures are prepared as transformers does, bit for bit",
        "Prompts have the ids that transformers' tokenizer gives them",
        "The ViT and the Q-Former in float16 are within 1% of float32",
        "Greedy answers in float16 have transformers' ids, but for ties",
        "So have those of 5 beams",
        "Log probabilities of answers are transformers', within 0.02",
        "run.py takes the checkpoint itself, and answers the same",
        "The ViT in INT8 is off by at most 14%, or the export refuses it",
    ):
        assert f"| {claim} | pass |" in text, text


@pytest.mark.slow
@pytest.mark.parametrize("size", ["demo", "full"])
def test_every_program_in_every_precision(hub, tmp_path, size):
    """As a user starts it: in processes of their own, the demo and random weights of full size."""
    if size == "full":
        hub.repositories[NAME] = tmp_path / "checkpoint"
        models.full_size_blip2(tmp_path / "checkpoint", language=True)
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "checkpoint")
    made = tmp_path / "made"
    command = ["--model_dir", NAME, "--image", SCENE, "--directory", made, "--pictures", 1]
    done = started(*command, **hub.environment(tmp_path / "home"))
    print(done.stdout)
    assert done.returncode in (0, 1), done.stderr
    check_claims((made / "report.md").read_text(), "float16", "int8", "int4")


def test_pictures_lie_in_the_wheel_of_scikit_image(tmp_path):
    """None is downloaded when it is asked for: the wheel's own list of files names them."""
    shipped = {str(file) for file in importlib.metadata.files("scikit-image")}
    assert {f"skimage/data/{name}" for name, _ in pictures.ASKED} <= shipped
    items = pictures.collect(str(ROOT / "demo" / "scene.png"), 12, tmp_path)
    assert len({item.file for item in items}) == 13
    assert pictures.read(tmp_path) == items
    assert items[0].prompt == "Question: which city is this? Answer:"

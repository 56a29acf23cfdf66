"""Many pictures: right lines in the input's order, and nothing lost or doubled however a run ends."""

from __future__ import annotations

import base64
import codecs
import contextlib
import dataclasses
import errno
import html
import html.parser
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_inputs import encoded, noise
from batch_runs import CHECKPOINT, SCENES, command, processes_of, read, scene, wait_for
from conftest import ROOT, run_program, start_program
from in_processes import die, die_of, repeated
from PIL import Image
from safetensors.torch import save_file

from blip2.engines import fingerprint
from blip2.errors import Blip2Error
from blip2.images import Preprocessing, load_image, resized_pixels
from blip2.language import GenerationOptions
from blip2.many import decoders as batch_decoders
from blip2.many import inputs, report
from blip2.many.decoders import Decoders, decode_picture
from blip2.many.journal import Journal
from blip2.many.local import LocalWorkers, stack_pictures
from blip2.many.processes import Killed, Processes
from blip2.many.recording import Summary, _progress_bar, record, retry_errors
from blip2.many.work import Answered, Batch, Question, Start, Work, find_start
from blip2.pipeline import Answer
from blip2.templates import fill_template
from demo import scenes

COUNT = "How many objects are there?"
NASTY = "<img src=x onerror=alert(1)>.png"
POLITE = (signal.SIGINT, signal.SIGTERM)


def test_each_picture_and_question_has_its_line(demo_opt, photos, tmp_path):
    """The truth is what was drawn; the pictures come as a folder, a list, a shard and a pattern."""
    wds = pytest.importorskip("webdataset")
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "b" / "2a.jpg").write_text("<html>")
    (folder / "b" / NASTY).write_bytes((folder / "c" / "d" / "7.png").read_bytes())
    with wds.TarWriter(str(tmp_path / "shard.tar")) as shard:
        shard.write({"__key__": "x/1", "png": (folder / "b" / "1.png").read_bytes(), "cls": "1"})
    # The programs run from anywhere, and import nothing of what lies there.
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "blip2").mkdir(parents=True)
    (elsewhere / "blip2" / "__init__.py").touch()
    missing = tmp_path / "missing.png"
    (tmp_path / "list.txt").write_text(f"{folder}/c/d/6.PNG\n\n{missing}\n")
    output, page = tmp_path / "new" / "out.jsonl", tmp_path / "page.html"
    sources = [folder, tmp_path / "list.txt", tmp_path / "shard.tar", folder / "b" / "[3-4].*"]
    done = run_program(
        *command(demo_opt, output, "--input_dir", *sources, "--html", page, "--batch_size", 4),
        *("--input_text", "", "--input_text", COUNT, "--input_text", f"Question: {COUNT} Answer:"),
        *("--num_beams", "2"),
        cwd=elsewhere,
    )
    assert done.returncode == 1, done.stderr
    lines = read(output)
    expected = []
    order = [0, 1, 2, None, 3, 4, 7, 5, 6, 7, 8, 6, None, 1, 3, 4]
    for number in order:
        if number is None:
            expected.append((None, "error"))
            continue
        truth = scene(number)
        expected.append(("", scenes.caption(truth)))
        expected += [(COUNT, str(len(truth.objects)))]
        expected += [(f"Question: {COUNT} Answer:", str(len(truth.objects)))]
    found = [(line.get("question"), line.get("answer", "error")) for line in lines]
    assert found == expected
    names = [Path(line.get("key", line["path"])).name for line in lines[::3]]
    assert names[0] == "0.PNG"
    bad = [line for line in lines if "error" in line]
    assert [set(line) for line in bad] == [{"path", "error"}] * 2
    assert "2a.jpg is no picture" in bad[0]["error"]
    assert "missing.png does not exist" in bad[1]["error"]
    [shard_line, *_] = [line for line in lines if "key" in line]
    assert (shard_line["path"], shard_line["key"]) == (str(tmp_path / "shard.tar"), "x/1.png")
    for line in lines:
        if "error" not in line:
            assert len(line["beams"]) == 2
            assert line["beams"][0]["text"] == line["answer"]
            assert line["beams"][0]["score"] >= line["beams"][1]["score"]
            assert line["flags"] == []
    assert "16 pictures done, 2 of them failed; 16 in this run" in done.stdout
    assert "16/16" in done.stderr
    check_page(page, pictures=14, texts=[scenes.caption(scene(8)), NASTY, "2a.jpg is no picture"])


def test_printed_lines_are_those_of_a_file(demo_opt, photos, tmp_path):
    """For pipes; a reader that goes ends the run quietly. The folder may have a slash."""
    output = tmp_path / "out.jsonl"
    asked = ("--input_dir", f"{photos}/b/", "--batch_size", 2)
    done = run_program(*command(demo_opt, output, *asked))
    assert done.returncode == 0, done.stderr
    asked = ("--input_dir", photos / "b", "--batch_size", 2)
    again = run_program(*command(demo_opt, output, *asked))
    assert "5 pictures done, 0 of them failed; 0 in this run" in again.stdout
    total = [line for line in done.stdout.splitlines() if line.startswith("total")]
    assert len(total) == 1
    run = run_program(*command(demo_opt, Path("-"), *asked), cwd=tmp_path)
    assert run.stdout == output.read_text()
    assert "5 pictures done" in run.stderr
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.options"]
    line = shlex.join([sys.executable, *command(demo_opt, Path("-"), *asked)])
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -n 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (piped.returncode, piped.stdout) == (0, output.read_text().partition("\n")[0] + "\n")
    assert "Traceback" not in piped.stderr


class Page(html.parser.HTMLParser):
    """The thumbnails and the texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.tags, self.text = [], set(), ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def check_page(path: Path, pictures: int, texts: list[str]) -> None:
    page = Page()
    page.feed(path.read_text())
    assert len(page.images) == pictures
    for image in page.images:
        assert set(image) == {"src", "alt", "loading"}
        kind, content = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) <= 320
    assert page.tags.isdisjoint({"a", "link", "iframe", "object", "base"})
    # Nothing but the page's own script, which nothing from outside is part of.
    assert path.read_text().count("<script") == report._HEAD.count("<script") + 1
    for text in texts:
        assert text in page.text


def test_runs_that_are_killed_go_on(demo_opt, photos, tmp_path):
    """kill -9, Ctrl-C or SIGTERM at random moments, in a sampled run, where batches show."""
    sampling = ("--top_p", 0.9, "--temperature", 3.0, "--seed", 3, "--batch_size", 2)
    arguments = ("--input_dir", *[photos] * 9, *sampling, "--max_output_len", 16)  # seconds
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    done = run_program(*command(demo_opt, whole, *arguments))
    assert done.returncode == 0, done.stderr
    expected = whole.read_bytes()
    answers = [line["answer"] for line in read(whole)]
    assert len(answers) == 9 * SCENES
    assert len(set(answers)) > 6 * SCENES  # no batch draws as another does

    marker = f"BATCH_TEST={os.getpid()}-{random.random()}"
    for sent, code in ((signal.SIGKILL, -9), (random.choice(POLITE), 130)):
        before = output.read_bytes() if output.exists() else b""
        target = before.count(b"\n") + random.choice((1, 3))
        process = start_program(*command(demo_opt, output, *arguments), **dict([marker.split("=")]))
        assert wait_for(
            lambda n=target: output.exists() and output.read_bytes().count(b"\n") >= n, 60
        )
        time.sleep(random.random() * 0.02)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        if sent in POLITE:
            assert "interrupted; the same command goes on where this one stopped" in errors
        written = output.read_bytes()
        assert expected.startswith(written)
        assert len(written) > len(before)
        assert written != expected
        assert wait_for(lambda: not processes_of(marker), 10)
        with open(output, "ab") as file:
            file.write(expected[len(written) :][: random.randint(1, 60)])  # a torn line
    done = run_program(*command(demo_opt, output, *arguments))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected


@pytest.mark.parametrize("system", ["macos", "windows"])
def test_other_systems_have_what_a_cpu_needs(demo_opt, photos, tmp_path, system):
    """Without what only Linux has, as far as that can be taken away here: see elsewhere.py."""
    elsewhere, output = ROOT / "tests" / "elsewhere.py", tmp_path / "out.jsonl"
    ask = [*command(demo_opt, output, "--input_dir", photos / "b"), "--html", tmp_path / "out.html"]
    del ask[ask.index("--workers") : ask.index("--workers") + 2]  # as many as processors allow
    convert = ("opt/convert_checkpoint.py", "--model_dir", CHECKPOINT, "--output_dir")
    for script, *rest in (ask, ask, (*convert, tmp_path / "opt")):
        done = run_program(elsewhere, system, ROOT / script, *rest)
        assert done.returncode == 0, done.stderr
    assert [line["answer"] for line in read(output)] == [
        scenes.caption(scene(number)) for number in range(5)
    ]
    left = ["opt", "out.html", "out.jsonl", "out.jsonl.options"]
    assert sorted(os.listdir(tmp_path)) == left
    assert sorted(os.listdir(tmp_path / "opt")) == sorted(os.listdir(demo_opt))


def journal(path: Path, **options) -> Journal:
    return Journal(path, 2, {"--num_beams": 1, **options})


def lines_of(name: str) -> list[dict]:
    return [{"path": name, "question": q, "answer": "a"} for q in "xy"]


def test_a_journal_is_continued_behind_its_last_whole_picture(tmp_path):
    path = tmp_path / "out.jsonl"
    with journal(path) as first:
        first.append([*lines_of("a"), {"path": "bad\udcff", "error": "e"}, *lines_of("c")])
    whole = path.read_bytes()
    # Half a picture, half a line, and both.
    half = json.dumps(lines_of("d")[0]).encode()
    for torn in (half + b"\n", half[:9], half + b"\n" + half[:9]):
        path.write_bytes(whole + torn)
        with journal(path) as again:
            assert (again.done, again.failed) == (3, 1)
            assert [name["path"] for name in again.names()] == ["a", "bad\udcff", "c"]
        assert path.read_bytes() == whole


def test_a_journal_refuses_what_would_mix(tmp_path):
    path = tmp_path / "out.jsonl"
    with journal(path) as first:
        with pytest.raises(Blip2Error, match="another run is writing"):
            journal(path)
        first.append(lines_of("a"))
    content = path.read_bytes()
    with pytest.raises(Blip2Error, match="begun with another --num_beams"):
        journal(path, **{"--num_beams": 2})
    path.write_bytes(b"garbage\n" + content)
    with pytest.raises(Blip2Error, match=r"damaged line before its end \(byte 0\)"):
        journal(path)
    assert path.read_bytes() == b"garbage\n" + content
    (tmp_path / "out.jsonl.options").unlink()
    with pytest.raises(Blip2Error, match=r"no out\.jsonl\.options beside it"):
        journal(path)


class FakePipeline:
    """Answers with the first value that it sees of a picture; notes every look and question."""

    vision = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, preprocessing=Preprocessing(4, 4)
    )

    language = SimpleNamespace(has_rows=False)

    def __init__(self) -> None:
        self.looks: list[int] = []
        self.asked: list[tuple[list[str], int]] = []

    def prepare(self, _texts, _options):
        pass

    def look(self, pixel_values, _stopwatch):
        self.looks.append(len(pixel_values))
        return pixel_values[:, :1, 0, 0].float()

    def ask(self, query_output, texts, options, _prefix):
        self.asked.append((texts, options.seed))
        return [[Answer(f"{value:.3f}")] for [value] in query_output.tolist()]


@pytest.fixture(scope="module")
def decoders():
    with Decoders(2) as pool:
        yield pool


@pytest.fixture
def fake_run(decoders, tmp_path):
    """Two questions about each of the files given, in batches of three, into one journal."""

    def run(files: list[str]) -> tuple[FakePipeline, Summary]:
        pipeline = FakePipeline()
        workers = LocalWorkers(pipeline, decoders)
        questions = [Question("", ""), Question("q", "Question: q Answer:")]
        with journal(tmp_path / "out.jsonl") as lines:
            start, options = find_start(files, lines, 3), GenerationOptions(end_id=0)
            work = Work(files, start, 3, Preprocessing(4, 4), questions, options)
            return pipeline, record(workers.answer(work), 1, len(files), lines)

    return run


def gray(directory: Path, count: int) -> list[str]:
    files = [str(directory / f"{number}.png") for number in range(count)]
    for number, file in enumerate(files):
        Image.new("RGB", (5, 5), (20 * number,) * 3).save(file)
    return files


def test_pictures_travel_as_bytes():
    """A batch of 64 is 9.6 MB; those that cannot be read are left out."""
    pictures = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = Batch(0, [], [pictures[0].numpy(), "no picture", pictures[1].numpy()])
    stacked = stack_pictures(batch, FakePipeline.vision)
    assert stacked.dtype == torch.uint8
    assert torch.equal(stacked, pictures)
    assert stack_pictures(Batch(0, [], ["no picture"]), FakePipeline.vision).shape == (0, 3, 4, 4)


def test_each_picture_is_looked_at_once_and_batches_stay_the_same(fake_run, tmp_path):
    files, output = gray(tmp_path, 7), tmp_path / "out.jsonl"
    Path(files[4]).write_text("no picture")
    pipeline, summary = fake_run(files)
    assert pipeline.looks == [3, 2, 1]
    assert [len(texts) for texts, _ in pipeline.asked] == [3, 3, 2, 2, 1, 1]
    assert len({seed for _, seed in pipeline.asked}) == 6
    assert (summary.done, summary.failed, summary.new) == (7, 1, 7)
    for file, lines in zip(files, report._answers(iter(read(output)), 2), strict=True):
        if file == files[4]:
            assert list(lines[0]) == ["path", "error"]
            continue
        value = resized_pixels(load_image(file), Preprocessing(4, 4))[0, 0, 0]
        assert [line["path"] for line in lines] == [file] * 2
        assert [line["answer"] for line in lines] == [f"{value:.3f}"] * 2

    content = output.read_bytes()
    pipeline, summary = fake_run(files)  # nothing is left to do
    assert pipeline.looks == []
    assert (summary.done, summary.failed, summary.new) == (7, 1, 0)
    # Four pictures and a bit: the batch of the fourth is computed as before, and written in part.
    output.write_bytes(b"".join(content.splitlines(keepends=True)[:8]) + content[-20:-5])
    pipeline, summary = fake_run(files)
    assert pipeline.looks == [2, 1]
    assert (summary.done, summary.failed, summary.new) == (7, 1, 3)
    assert output.read_bytes() == content


def test_other_pictures_are_refused(fake_run, tmp_path):
    files, output = gray(tmp_path, 4), tmp_path / "out.jsonl"
    fake_run(files)
    content = output.read_bytes()
    for others in (files[1:], files[:3], [files[0], *files]):
        with pytest.raises(
            Blip2Error, match=r"png, which is no longer there|0\.png is new in the i"
        ):
            fake_run(others)
        assert output.read_bytes() == content
    fake_run([*files, files[0]])  # more of them behind the others
    assert output.read_bytes() == content + b"".join(content.splitlines(keepends=True)[:2])


def test_a_table_of_times_adds_up_to_what_the_clock_says():
    around = {"before": {"start": 4.0}, "after": {"page": 1.0}}
    alone = Summary(1, 0, 1, 3.0, {"ViT": 1.0, "OPT": 2.0}, **around).table(10.0)
    first, _, *rows = alone.splitlines()
    assert first.startswith("1 picture done, 0 of them failed; 1 in this run, 0.3 pictures/s")
    found = {row[:20].strip(): row[20:].split() for row in rows}
    assert list(found) == ["start", "ViT", "OPT", "page", "other", "total"]
    *parts, total = (float(cells[0]) for cells in found.values())
    assert sum(parts) == total == 10
    several = Summary(4, 0, 4, 5.0, {"ViT": 9.0}, 2, {"start": 4.0}).table(10.0)
    assert "sum of 2 workers" in several.splitlines()[1]
    assert [row.split()[-3:] for row in several.splitlines()[2:]] == [
        ["9.0", "s", "90%"],
        ["1.0", "s", "10%"],
        ["10.0", "s", "100%"],
    ]
    assert "total, 2 x 5.0 s" in several


def test_a_start_and_the_middle_of_a_run_are_told_apart(tmp_path, monkeypatch):
    """Batches of 10 pictures, 5 s after the command the first; the last five are slower."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def answers(count, faster):
        for number in range(count):
            clock[0] += 3.0 if number in (0, *range(count - 5, count)) else 0.5 / faster
            lines = [lines_of(f"{10 * number + n}") for n in range(10)]
            yield Answered(10 * number, lines, {}, clock[0])

    for count, rate in ((40, 20.0), (40, 40.0), (8, 0.0)):
        with journal(tmp_path / f"{count}-{rate}.jsonl") as lines:
            begun = clock[0] - 2.0
            summary = record(answers(count, rate / 20 or 1), 1, 10 * count, lines, begun)
        assert summary.first_after == 5.0
        assert summary.middle_rate == pytest.approx(rate)
        about = dataclasses.replace(summary, before={"start": 2.0}).table(30.0).splitlines()[1]
        assert about == "first answer after 5.0 s (start 2.0)" + (
            f"; {rate:.1f} pictures/s in the middle of the run" if rate else ""
        )


def test_the_progress_bar_shows_the_rate_of_the_last_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with _progress_bar(total=1000, done=500) as bar:
        assert bar.format_dict["rate"] is None
        clock[0] += 60  # engines load
        for _ in range(40):
            bar.update(10)
            clock[0] += 1
        assert bar.format_dict["rate"] == pytest.approx(10, rel=0.15)
        for _ in range(40):
            bar.update(2)
            clock[0] += 1
        assert bar.format_dict["rate"] == pytest.approx(2, rel=0.15)
        clock[0] += 100
        assert bar.format_dict["rate"] < 0.3


def test_a_summary_says_what_holds_a_long_run_back():
    """Once there were batches enough to say so; what the first waits for is no sign."""
    for waited, rate, is_said in ((3.0, 9.0, True), (1.0, 9.0, False), (3.0, 0.0, False)):
        seconds = {"wait for pictures": waited, "OPT": 6.0}
        table = Summary(90, 0, 90, 10.0, seconds, middle_rate=rate).table(12.0)
        assert ("30% of the time the engines waited for pictures" in table) == is_said
    two = Summary(90, 0, 90, 10.0, {"wait for pictures": 6.0}, 2, middle_rate=9.0).table(12.0)
    assert two.endswith("give more --workers, or --decode fast for large JPEGs")


def test_a_new_picture_is_the_one_that_is_named(fake_run, tmp_path):
    files = gray(tmp_path, 5)
    fake_run(files[:1] + files[2:4])
    with pytest.raises(
        Blip2Error, match=rf"{files[1]} is new in the input.* has {files[2]} in its"
    ):
        fake_run(files)


@pytest.fixture
def retry(decoders, tmp_path):
    """As fake_run, for what failed; `dies` after that many batches."""

    def run(files: list[str], dies: int | None = None) -> tuple[FakePipeline, Summary]:
        pipeline = FakePipeline()
        workers = LocalWorkers(pipeline, decoders)
        if dies is not None:
            answer = workers.answer

            def some(work):
                yield from itertools.islice(answer(work), dies)
                raise KeyboardInterrupt

            workers.answer = some
        questions = [Question("", ""), Question("q", "Question: q Answer:")]
        with journal(tmp_path / "out.jsonl") as lines:
            find_start(files, lines, 3)
            options = GenerationOptions(end_id=0)
            work = Work(files, Start(), 3, Preprocessing(4, 4), questions, options)
            return pipeline, retry_errors(workers, work, lines)

    return run


def test_errors_are_answered_again_and_nothing_else_changes(fake_run, retry, tmp_path):
    files, output = gray(tmp_path, 11), tmp_path / "out.jsonl"
    fake_run(files)
    right = output.read_bytes()
    output.unlink()
    whole = {number: Path(files[number]).read_bytes() for number in (0, 3, 4, 5, 7, 10)}
    for number in whole:
        Path(files[number]).write_text("no picture")
    fake_run(files)
    failed = output.read_bytes()
    for number in (0, 3, 4, 7, 10):
        Path(files[number]).write_bytes(whole[number])
    # Interrupted between batches; then torn anywhere, as kill -9 leaves it.
    with pytest.raises(KeyboardInterrupt):
        retry(files, dies=2)
    begun = tmp_path / "out.jsonl.retry"
    assert output.read_bytes() == failed
    torn = begun.read_bytes()
    bad = [line for line in failed.splitlines(keepends=True) if b'"error"' in line]
    expected = b""
    for line in right.splitlines(keepends=True):
        name = json.loads(line)["path"]
        expected += line if name != files[5] else b"" if json.loads(line)["question"] else bad[3]
    for end in {0, 1, 200, len(torn) // 2, len(torn) - 1, len(torn)}:
        output.write_bytes(failed)
        begun.write_bytes(torn[:end])
        _, summary = retry(files)
        assert output.read_bytes().splitlines() == expected.splitlines()
        assert (summary.done, summary.failed) == (11, 1)
        assert not begun.exists()
    # Of a batch that was written in part, all is asked again: sampled answers depend on it.
    output.write_bytes(failed)
    begun.write_bytes(torn[: torn.index(json.dumps(files[4]).encode()) - len('{"path": ')])
    pipeline, _ = retry(files)
    assert pipeline.looks == [2, 1, 1]
    assert output.read_bytes() == expected
    _, summary = fake_run(files)  # goes on as ever, with nothing left to do
    assert (summary.done, summary.failed, summary.new) == (11, 1, 0)
    Path(files[5]).write_bytes(whole[5])
    assert retry(files)[1].failed == 0
    assert output.read_bytes() == right


def test_a_retry_of_another_output_is_not_gone_on_with(fake_run, tmp_path):
    (tmp_path / "out.jsonl.retry").write_text('{"path": "x", "error": "e"}\n')
    fake_run(gray(tmp_path, 2))
    assert not (tmp_path / "out.jsonl.retry").exists()


def test_lines_are_read_by_any_reader_and_show_names_as_they_are(tmp_path):
    names = ["猫 🐈 é.png", "a\u2028b\x85\x9b\x7f.png", "bad\udcff.png", "\U000e0001"]
    with journal(tmp_path / "out.jsonl") as lines:
        lines.append([{"path": name, "error": ""} for name in names])
    content = (tmp_path / "out.jsonl").read_bytes().decode()
    assert "猫 🐈 é.png" in content
    assert [json.loads(line)["path"] for line in content.splitlines()] == names
    assert all(character.isprintable() for character in content.replace("\n", ""))


def test_full_disks_are_one_sentence(tmp_path):
    with journal(tmp_path / "out.jsonl") as full, open("/dev/full", "ab", buffering=0) as device:
        full._file = device
        with pytest.raises(Blip2Error, match="No space left on device; mend that"):
            full.append(lines_of("a"))


def test_decoders_give_the_values_of_each_picture_in_order(decoders, photos, tmp_path):
    wds = pytest.importorskip("webdataset")
    files = inputs.list_entries([str(photos)])
    with wds.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number}", "png": Path(file).read_bytes()})
    preprocessing = Preprocessing(96, 96)
    for entries in (files, [str(tmp_path / "s.tar")]):
        pictures = list(inputs.read_pictures(entries))
        assert inputs.count_pictures(entries) == len(pictures) == SCENES
        batches = [pictures[start : start + 2] for start in range(0, SCENES, 2)]
        decoded = list(decoders.decode(batches, preprocessing))
        assert [batch for batch, _ in decoded] == batches
        for file, values in zip(files, [v for _, vs in decoded for v in vs], strict=True):
            assert np.array_equal(values, resized_pixels(load_image(file), preprocessing))


def test_large_jpegs_may_be_decoded_fast(decoders, tmp_path):
    """As Pillow decodes them at a smaller scale, at least twice the ViT's side."""
    file = tmp_path / "large.jpg"
    Image.effect_noise((1600, 1200), 60).convert("RGB").save(file, quality=90)
    preprocessing = Preprocessing(96, 96)
    batches = [[inputs.Picture(str(file))]]
    [[_, [exact]]] = decoders.decode(batches, preprocessing)
    [[_, [fast]]] = decoders.decode(batches, preprocessing, True)
    drawn = Image.open(file)
    drawn.draft("RGB", (192, 192))
    assert drawn.size == (400, 300)
    expected = np.asarray(drawn.resize((96, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(fast, expected)
    assert not np.array_equal(fast, exact)


@pytest.mark.parametrize("is_fast", [False, True])
def test_the_work_says_how_pictures_are_decoded(is_fast):
    asked = []
    decoders = SimpleNamespace(decode=lambda *arguments: asked.append(arguments) or iter(()))
    options = GenerationOptions(end_id=0)
    work = Work([], Start(), 3, Preprocessing(4, 4), [Question("", "")], options, is_fast=is_fast)
    assert list(LocalWorkers(FakePipeline(), decoders).answer(work)) == []
    assert [arguments[2] for arguments in asked] == [is_fast]


def test_a_decoding_process_is_small(decoders, tmp_path):
    """Many run at once: what starts slowly and takes hundreds of megabytes is imported in none."""
    batches = [[inputs.Picture(file)] for file in gray(tmp_path, 3)]
    list(decoders.decode(batches, Preprocessing(4, 4)))
    [modules] = decoders._processes.map(eval, ["set(__import__('sys').modules)"]).result()
    assert {"numpy", "PIL"} <= modules
    assert not modules & {"torch", "onnx", "onnxruntime", "tokenizers", "transformers"}


def test_decoding_processes_that_cannot_start_are_one_sentence(monkeypatch):
    """As a start whose process ends before it has read what it is for."""

    def fail(_process):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("multiprocessing.context.SpawnProcess._Popen", staticmethod(fail))
    with pytest.raises(
        Blip2Error, match=r"cannot start a process that decodes.*: Broken pipe; end"
    ):
        Decoders(2)


def test_decoding_processes_never_hear_of_an_interrupt(decoders):
    """Not even while they start, when no handler of ours is set yet; this process does."""
    ask = "__import__('signal').pthread_sigmask(0, [])"
    assert signal.SIGINT in decoders._processes.map(eval, [ask]).result()[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


ABANDON = """
import sys, time
from blip2.many.decoders import Decoders
for delay in range(12):
    with Decoders(1) as decoders:
        decoders._processes.map(int, [1]).result()
        decoders._processes.map(bytes, [100_000_000])
        time.sleep(0.01 * delay)
"""


def test_a_process_that_ends_while_it_answers_holds_nobody_up():
    """At some of these moments it has sent half of a result."""
    done = subprocess.run([sys.executable, "-c", ABANDON], cwd=ROOT, timeout=100)
    assert done.returncode == 0


def test_a_picture_that_kills_its_process_is_given_up(decoders, tmp_path):
    """After three tries, with its name; the others of its batch, and later ones, are decoded."""
    files = gray(tmp_path, 30)
    bad = os.fsencode(files[5]), os.fsencode(files[6]), os.fsencode(files[29])
    pids = tmp_path / "pids"

    batches = [
        [inputs.Picture(file) for file in files[start : start + 10]] for start in (0, 10, 20)
    ]
    results = []
    for batch in batches:
        together = [decoders._processes.map(die_of, batch[n : n + 5], bad, pids) for n in (0, 5)]
        results += [result for future in together for result in future.result()]
    for file, result in zip(files, results, strict=True):
        assert isinstance(result, Killed) == (os.fsencode(file) in bad)
        if os.fsencode(file) not in bad:
            assert np.array_equal(result, resized_pixels(load_image(file), Preprocessing(4, 4)))
    killed = pids.read_text().split()
    assert len(killed) == len(set(killed)) == 9


def test_what_killed_its_process_is_a_line_of_its_own(decoders, tmp_path, monkeypatch):
    pictures = [inputs.Picture(file) for file in gray(tmp_path, 2)]
    monkeypatch.setattr(batch_decoders, "decode_picture", die)
    monkeypatch.setattr(batch_decoders, "_thumbnail", die)
    pictures[1] = inputs.Picture("s.tar", "1.png", b"")
    [(_, [first, second])] = decoders.decode([pictures], Preprocessing(4, 4))
    assert first.startswith(f"{pictures[0].path} has ended each of the 3 processes that decoded it")
    assert second.startswith("s.tar/1.png has ended each of")
    assert list(decoders.thumbnails([pictures])) == [(pictures, [None, None])]


def test_processes_that_are_killed_while_they_work_lose_nothing():
    """Whatever they are about: some have half of a result sent."""
    with Processes(2) as processes:
        futures = [processes.map(repeated, range(n, n + 5), 300_000) for n in range(0, 200, 5)]
        killed = set()
        for chunk in (0, 5, 12, 13, 25, 38):
            [*_, (pid, _)] = futures[chunk].result()
            time.sleep(random.random() * 0.02)
            with contextlib.suppress(ProcessLookupError):  # it may have been killed before
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        results = [result for future in futures for result in future.result()]
    assert [(len(result), result[:1]) for _, result in results] == [
        (300_000, bytes([number])) for number in range(200)
    ]
    assert len(killed) >= 2  # whoever answered first is dead when the last are answered


def test_a_bug_in_a_process_keeps_its_traceback(decoders):
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        decoders._processes.map(eval, ["1", "1 / 0", "2"]).result()
    assert decoders._processes.map(eval, ["1", "2"]).result() == [1, 2]


def shard_of(directory: Path, keys: str, mode: str = "w") -> Path:
    """A shard of grey pictures, each with a text, as tarfile writes it."""
    path = directory / f"{keys}.tar{mode[1:].replace(':', '.')}"
    with tarfile.open(path, mode) as shard:
        for key in keys:
            for name, content in ((f"{key}.png", encoded(noise(), "PNG")), (f"{key}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_is_read_as_webdataset_reads_it(tmp_path, mode):
    wds = pytest.importorskip("webdataset")
    shard = shard_of(tmp_path, "abc", mode)
    with open(shard, "rb") as stream:
        theirs = wds.tariterators.tar_file_expander([{"url": "", "stream": stream}], eof_value=None)
        expected = [(m["fname"], m["data"]) for m in theirs if m["fname"].endswith("png")]
    found = list(inputs.read_pictures(inputs.list_entries([str(shard)])))
    assert [(picture.key, picture.read()) for picture in found] == expected
    assert len(expected) == inputs.count_pictures([str(shard)]) == 3
    # Of one that is not compressed nothing travels but where to read.
    assert all((picture.content is None) == (mode == "w") for picture in found)
    os.truncate(shard, 600)
    decoded = decode_picture(found[-1], Preprocessing(4, 4))
    if mode == "w":
        assert decoded == f"{shard} has become shorter; replace the file"
        shard.unlink()
        assert "cannot read" in decode_picture(found[-1], Preprocessing(4, 4))


def test_a_shard_cut_anywhere_gives_what_it_has_and_one_error(tmp_path):
    shard = shard_of(tmp_path, "abc")
    content = shard.read_bytes()
    with tarfile.open(shard) as whole:
        members = whole.getmembers()
    end = members[-1].offset_data + 512
    starts = [*(member.offset for member in members), end]
    # Between members, in a header, in what is in a file, and in the zeros behind it.
    cuts = {start + more for start in starts for more in (-1, 0, 100, 600)}
    for cut in sorted(cut for cut in cuts if 0 < cut < end + 512):
        shard.write_bytes(content[:cut])
        *good, broken = inputs.read_pictures([str(shard)])
        complete = [m.name for m in members[::2] if m.offset_data + m.size <= cut]
        assert [picture.key for picture in good] == complete
        assert (broken.path, broken.key) == (str(shard), None)
        assert "abc.tar is truncated (" in broken.error
        assert inputs.count_pictures([str(shard)]) > len(good)
    shard.write_bytes(content[: end + 512])  # one block of its end is enough
    assert [p.error for p in inputs.read_pictures([str(shard)])] == [None] * 3


def test_a_damaged_shard_gives_what_it_has_and_one_error(tmp_path):
    shard = shard_of(tmp_path, "abc")
    content = shard.read_bytes()
    with tarfile.open(shard) as whole:
        second = whole.getmember("b.png")
    for hole in (b"\xff" * 512, bytes(600)):  # over the second picture's header, and behind it
        end = second.offset + len(hole)
        shard.write_bytes(content[: second.offset] + hole + content[end:])
        *good, broken, last = inputs.read_pictures([str(shard), "next.png"])
        assert [picture.key for picture in good] == ["a.png"]
        assert f"{shard} is damaged (" in broken.error
        assert (last.path, last.error) == ("next.png", None)
    for text in ("no tar", "no tar" * 99):
        shard.write_text(text)
        [broken] = inputs.read_pictures([str(shard)])
        assert f"{shard} is " in broken.error
    gone = tmp_path / "gone.tar"
    [broken] = inputs.read_pictures([str(gone)])
    assert "gone.tar is damaged (No such file or directory)" in broken.error


def test_shards_behind_one_another_in_a_file_are_read(tmp_path):
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(shard_of(tmp_path, keys).read_bytes() for keys in ("ab", "c")))
    keys = [picture.key for picture in inputs.read_pictures([str(both)])]
    assert keys == ["a.png", "b.png", "c.png"]
    os.truncate(both, shard_of(tmp_path, "ab").stat().st_size + 600)
    *_, broken = inputs.read_pictures([str(both)])
    assert "both.tar is truncated" in broken.error


def test_what_no_file_of_a_shard_may_be_is_an_error_of_its_own(tmp_path, monkeypatch):
    """Larger than a picture alone may be, or a link; what macOS adds is no picture."""
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 2000)
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as writer:
        for name, size in {"big.png": 2001, "._a.png": 9, "__MACOSX/a.png": 9, "a.png": 9}.items():
            member = tarfile.TarInfo(name)
            member.size = size
            writer.addfile(member, io.BytesIO(bytes(size)))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        writer.addfile(link)
    big, whole, link = inputs.read_pictures([str(shard)])
    assert (big.key, big.content) == ("big.png", None)
    assert "s.tar/big.png is larger than" in big.error
    assert (whole.key, whole.error) == ("a.png", None)
    assert "s.tar/link.png is a link" in link.error
    assert inputs.count_pictures([str(shard)]) == 3
    assert big.error in decode_picture(big, Preprocessing(4, 4))


def test_every_suffix_of_the_formats_is_one_of_a_picture(tmp_path):
    """By each name under which Pillow saves a format, in folders and shards; not what macOS adds."""
    formats = {"BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
    suffixes = [s for s, name in Image.registered_extensions().items() if name in formats]
    assert {".jfif", ".jpe", ".dib", ".pnm", ".tif", ".apng", ".mpo"} <= set(suffixes)
    folder, extra = tmp_path / "photos", tmp_path / "photos" / "__MACOSX"
    extra.mkdir(parents=True)
    for suffix in suffixes:
        grey = Image.new("F" if suffix == ".pfm" else "L", (5, 4), 128)
        grey.save(folder / f"a{suffix.upper()}", Image.registered_extensions()[suffix])
    for name in ("._a.jpg", "._a.tar", "__MACOSX/a.jpg", "__MACOSX/._a.jpg", "notes.txt"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    files = inputs.list_entries([str(folder)])
    assert sorted(Path(file).suffix.lower() for file in files) == sorted(suffixes)
    assert inputs.list_entries([f"{folder}/**"]) == inputs.list_entries([f"{folder}/*"]) == files
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(folder, "photos")
    members = list(inputs.read_pictures([str(tmp_path / "s.tar")]))
    assert len(members) == len(suffixes)
    for picture in (*members, *map(inputs.Picture, files)):
        assert not isinstance(decode_picture(picture, Preprocessing(4, 4)), str), picture


@pytest.mark.parametrize(
    "pattern",
    [
        *("{000..009}.tar", "{0..10}", "{9..11}", "{09..11}", "{3..1}", "{010..1}", "{1..03}"),
        *("a{1..3}b{x,y}", "{,x}y", "{a}", "{}", "x{b,a,b}{0..1}/c", "http://x/{0..2}.png"),
    ],
)
def test_braces_stand_for_what_they_do_in_webdataset(pattern):
    theirs = pytest.importorskip("braceexpand")
    assert inputs.expand(pattern) == list(theirs.braceexpand(pattern))


def test_braces_comments_and_hidden_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1.png", "a2.png", "#3.png", "{1..2}.png", "d/x.png", "d/.git/y.png", ".e/z.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("list.txt").write_text("# all of them\na1.png\n #none\n#3.png\n")
    assert inputs.list_entries(["a{1..2}.png", "list.txt"]) == [
        "a1.png",
        "a2.png",
        "a1.png",
        "#3.png",
    ]
    assert inputs.list_entries(["{1..2}.png"]) == ["{1..2}.png"]
    assert inputs.is_collection("a{1..2}.png")
    assert inputs.list_entries(["d", ".e"]) == ["d/x.png", ".e/z.png"]
    with pytest.raises(Blip2Error, match=r"a3\.png does not exist"):
        inputs.list_entries(["a{1..3}.png"])
    with pytest.raises(Blip2Error, match="more than"):
        inputs.list_entries(["{0..99999999999}.png"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n\n"])
def test_lists_as_editors_write_them(tmp_path, monkeypatch, encoding, end):
    monkeypatch.chdir(tmp_path)
    Path(" c .png").touch()
    names = ["a.png", "猫.png", "http://x/a b.png", " c .png", "d\u2028\x0c.png"]
    lines = ["a.png", "  猫.png\t", " http://x/a b.png ", " c .png", "d\u2028\x0c.png ", " ", ""]
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    Path("list.txt").write_bytes(mark + end.join(lines).encode(encoding))
    assert inputs.list_entries(["list.txt"]) == names


def test_lists_of_names_in_no_encoding(tmp_path):
    """A name is bytes; in a list that says how it is encoded, what is not so is an error."""
    (tmp_path / "list.txt").write_bytes(b"\xff\xe9.png\n")
    assert os.fsencode(inputs.list_entries([str(tmp_path / "list.txt")])[0]) == b"\xff\xe9.png"
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF16_LE + b"a\0b")
    with pytest.raises(Blip2Error, match=r"cannot read .*list\.txt: .*truncated data; save it"):
        inputs.list_entries([str(tmp_path / "list.txt")])


def test_sources_without_pictures_are_refused(tmp_path):
    (tmp_path / "a.md").touch()
    (tmp_path / "empty.txt").touch()
    for source, message in {
        "": "holds no picture",
        "none": "does not exist",
        "*.jpg": "holds no picture",
        "empty.txt": "holds no picture",
    }.items():
        with pytest.raises(Blip2Error, match=message):
            inputs.list_entries([str(tmp_path / source)])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", ["empty"]),
        ("a red circle and a red square", []),
        ("no no", []),
        ("a cat on a mat on a mat on a mat on", ["loop"]),
        ("so very very very", ["loop"]),
        ("very very very good", []),
    ],
)
def test_flags(answer, expected):
    assert Answer(answer).flags == expected
    assert Answer(answer, finished=False).flags == [*expected, "length"]


TEMPLATE = "Question: {} Answer:"
IN_FORM = "Question: why? Answer:"


@pytest.mark.parametrize(
    ("template", "text", "prompt"),
    [
        (TEMPLATE, "why?", IN_FORM),
        (TEMPLATE, " why?\n\n\n", IN_FORM),
        *(
            (TEMPLATE, text, IN_FORM)
            for text in (
                IN_FORM,
                f"{IN_FORM} ",
                f"\t {IN_FORM}",
                f"{IN_FORM}\r\n",
                f"\n\n{IN_FORM}\n\n\n",
                "Question:  why?\n\nAnswer:",
                "Question:why?Answer:",
            )
        ),
        (TEMPLATE, *["Question: a? Answer: b. Question: c? Answer:"] * 2),
        (TEMPLATE, 'what does "Answer:" mean?', 'Question: what does "Answer:" mean? Answer:'),
        (TEMPLATE, "Question: why?", "Question: Question: why? Answer:"),
        (TEMPLATE, "", ""),
        (TEMPLATE, " \n\n ", ""),
        ("{}", "why?", "why?"),
        ("{}", " why?\n", "why?"),
        ("{}!", "{0} {}", "{0} {}!"),
        ("a {}", "apple", "a apple"),
        ("a {}", "a cat", "a cat"),
        ("{} is", "this", "this is"),
        ("a  photo\nof {}.", "a photo of me.", "a  photo\nof me."),
        ("(.*) {}", "x", "(.*) x"),
    ],
)
def test_templates_wrap_what_has_not_their_form(template, text, prompt):
    filled = fill_template(template, text)
    assert filled == prompt
    assert fill_template(template, filled) == filled


def test_fingerprints_change_with_the_engine(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.onnx").write_bytes(b"1")
    first = fingerprint(tmp_path)
    (tmp_path / ".gitkeep").touch()
    assert fingerprint(tmp_path) == first
    (tmp_path / "a.onnx").write_bytes(b"2")
    assert fingerprint(tmp_path) != first


def test_fingerprints_change_with_the_content_of_large_files(tmp_path):
    """TensorRT-LLM's engines and checkpoints have no description with their hash."""
    content = np.random.default_rng(0).bytes(3 << 20)
    prints = set()
    for other in (content, content[:-1] + b"!", bytes(9) + content[9:], content[::-1]):
        (tmp_path / "rank0.engine").write_bytes(other)
        prints.add(fingerprint(tmp_path))
    assert len(prints) == 4


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_fingerprints_change_with_a_checkpoints_weights(tiny_checkpoint, tmp_path, container):
    """Of the same names and sizes, as two fine-tunes of one model are."""
    shutil.copy(tiny_checkpoint.checkpoint / "config.json", tmp_path)
    state = {name: tensor.clone() for name, tensor in tiny_checkpoint.model.state_dict().items()}
    prints = set()
    for change in range(2):
        state["qformer.encoder.layer.0.output_query.dense.weight"] += change
        if container.endswith(".bin"):
            torch.save(state, tmp_path / container)
        else:
            save_file(state, tmp_path / container, metadata={"format": "pt"})
        prints.add(fingerprint(tmp_path))
    assert len(prints) == 2


REFUSED = {
    "no pictures": (["--output", "o"], "give --input_dir the pictures"),
    "benchmark": (
        ["--output", "o", "--input_dir", "p", "--benchmark", "2"],
        "--output goes without",
    ),
    "page alone": (["--html", "p.html"], "--html goes with --output"),
    "score alone": (["--min_score", "-1"], "--min_score goes with --output"),
    "fast alone": (["--decode", "fast"], "--decode goes with --output"),
    "kept nothing": (["--keep_prefix"], "--keep_prefix goes with --prefix"),
    "rejected from a pipe": (
        ["--output", "-", "--input_dir", "p", "--reject", "loop"],
        "--reject needs --output FILE",
    ),
    "a form for a server": (
        ["--server", "http://x", "--output", "o.csv", "--input_dir", "p"],
        "with --server --output is a FILE.jsonl",
    ),
    "a stop for a server": (
        ["--server", "http://x", "--input_dir", "p", "--stop", "."],
        "--stop goes without --server",
    ),
    "two texts": (["--input_text", "a", "--input_text", "b"], "several --input_text need --output"),
    "a folder": (["--input_dir", "tests"], "tests stands for several pictures; add --output"),
    "two pictures": (["--input_dir", "a", "b"], "several pictures need --output"),
    "template": (["--prompt_template", "Q:"], "'Q:' has not one {}"),
    "tensor": (["--output", "o", "--input_dir", "none.pt"], "none.pt does not exist"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refusals_are_one_line_and_leave_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, message = REFUSED[case]
    arguments = [str(tmp_path / "o") if a == "o" else a for a in arguments]
    done = run_program("run.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_page_replaces_pages_alone(decoders, tmp_path):
    page, output = tmp_path / "page.html", tmp_path / "out.jsonl"
    files = gray(tmp_path, 2)
    for name in files:
        output.write_text(json.dumps({"path": name, "question": "", "answer": "a", "flags": []}))
        report.check_place(page)
        report.write_report(page, output, [name], decoders, 1)
    assert Path(files[1]).name in page.read_text()
    assert Path(files[0]).name not in page.read_text()
    page.write_text("<!DOCTYPE html><style>p { color: red; }</style>")
    for place in (report.check_place, lambda p: report.write_report(p, output, files, decoders, 1)):
        with pytest.raises(Blip2Error, match=r"page\.html exists, and was not written by this"):
            place(page)
    assert "color: red" in page.read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Reported by the page itself: what a phone would show of it.
MEASURE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.measured = JSON.stringify({
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    images: images.filter((image) => image.naturalWidth > 0).length,
    columns: new Set(images.map((image) => image.getBoundingClientRect().left)).size,
    small: [...document.querySelectorAll("p")].filter(
      (text) => parseFloat(getComputedStyle(text).fontSize) < 16).length,
  });
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "columns"), [(500, 1), (1200, 4)])
def test_a_browser_shows_the_page_without_sideways_scrolling(
    decoders, photos, tmp_path, width, columns
):
    """500 pixels is the narrowest window that headless Chromium opens."""
    files, output = inputs.list_entries([str(photos)]), tmp_path / "out.jsonl"
    long = "Question" + "abcdefghij" * 30
    with journal(output) as lines:
        for file in files:
            lines.append(
                [
                    {"path": file, "question": "", "answer": long, "flags": ["loop"]},
                    {"path": file, "question": long, "answer": "<b>3</b>", "flags": []},
                ]
            )
    page, shown = tmp_path / "page.html", tmp_path / "measured.html"
    report.write_report(page, output, files, decoders, 2)
    # The load event waits for pictures, but not for those that are lazy.
    at_once = page.read_text().replace('loading="lazy"', "")
    shown.write_text(at_once.replace("</body>", MEASURE + "</body>"))

    def browse(*arguments: str) -> str:
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"),
                *arguments,
                shown.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    [found] = re.findall(r"data-measured=\"([^\"]*)\"", browse("--dump-dom"))
    found = json.loads(html.unescape(found))
    assert found["width"] == width
    assert found["content"] <= width
    assert found["images"] == SCENES
    assert found["columns"] == columns
    assert found["small"] == 0
    browse(f"--screenshot={tmp_path / 'page.png'}")
    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)
    assert len(colours) > 500  # scenes, not an empty page

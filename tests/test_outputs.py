"""Every form of output: the same answers in each, and after kill -9 none lost, doubled or different."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import tarfile
from pathlib import Path

import pytest
from batch_runs import SCENES, command, read, scene, wait_for
from conftest import run_program, start_program
from PIL import Image

from blip2.errors import Blip2Error
from blip2.many import inputs
from blip2.many.formats import Sidecars
from blip2.many.journal import Journal
from blip2.many.outputs import Rule, Target
from demo import scenes

QUESTIONS = 2
NASTY = 'a "quoted",\nname \u2028 猫.png'


def lines_of(name: str, **more) -> list[dict]:
    first = {"question": "", "answer": f'a, "b"\nof {name}', "score": -0.25, "flags": []}
    second = {"question": "q", "answer": "no no no", "score": -2.5, "flags": ["loop", "length"]}
    return [{"path": name, **more, **first}, {"path": name, **more, **second}]


def write(target: Target, sources, entries, pictures: list[list[dict]], at_once: int = 2) -> None:
    """As a run that answers so; what is in the journal already is not answered again."""
    with Journal(target.journal, QUESTIONS, target.made_with()) as journal:
        left = pictures[journal.done :]
        with target.following(journal, sources, entries, QUESTIONS) as appended:
            for start in range(0, len(left), at_once):
                batch = left[start : start + at_once]
                appended.append([line for of_one in batch for line in of_one])


@pytest.fixture
def files(tmp_path) -> list[str]:
    names = ["a.png", "sub/b.jpg", "c.png", NASTY, "sub/deep/e.webp"]
    for number, name in enumerate(names):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), (40 * number,) * 3).save(path)
    return [str(tmp_path / "photos" / name) for name in names]


def answered(files: list[str]) -> list[list[dict]]:
    pictures = [lines_of(name) for name in files]
    pictures[2] = [{"path": files[2], "error": "no picture"}]
    return pictures


def outputs_in(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in kept
        if ".journal" not in path.name and "photos" not in path.parts
    }


FORMS = ["x.jsonl", "x.csv", "x.parquet", "x.tar", "x/"]
RULE = Rule(-1.0, ["empty"])


def target_of(folder: Path, form: str, **settings) -> Target:
    return Target.of(os.path.join(folder, form), rule=RULE, shard_size=2, **settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_run_continued_anywhere_writes_what_one_run_does(tmp_path, files, form, seed):
    """However it was killed: with a journal torn anywhere, and outputs cut, lost or never there."""
    chance = random.Random(seed)
    if form == "x.parquet":
        pytest.importorskip("pyarrow")
    pictures = answered(files)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write(target_of(whole, form), [], files, pictures)
    expected = outputs_in(whole)
    assert expected
    target = target_of(parts, form)
    for _ in range(4):
        done = chance.randrange(len(pictures) + 1)
        write(
            target, [], files, pictures[: max(done, 0)] if not target.journal.exists() else pictures
        )
        content = target.journal.read_bytes()
        target.journal.write_bytes(content[: chance.randrange(len(content) + 1)])
        for path in parts.rglob("*"):
            if path.is_file() and ".journal" not in path.name and chance.random() < 0.5:
                if form in ("x.jsonl", "x.csv"):
                    os.truncate(path, chance.randrange(path.stat().st_size + 1))
                elif form == "x.parquet":
                    path.unlink()
    write(target, [], files, pictures)
    assert outputs_in(parts) == expected


def test_a_table_has_a_row_for_each_line(tmp_path, files):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    pictures = answered(files)
    pictures[0][0]["beams"] = [{"text": "a", "score": -0.5, "log_prob": -0.5, "flags": []}]
    pictures[1][0] = {**pictures[1][0], "path": "shard.tar", "key": "x/1.png", "score": None}
    pictures[1][1] = {**pictures[1][1], "path": "shard.tar", "key": "x/1.png"}
    pictures[4][0]["path"] = "bad\udcff.png"
    lines = [line for of_one in pictures for line in of_one]
    for form in ("csv", "parquet"):
        write(Target.of(str(tmp_path / f"x.{form}")), [], files, pictures)
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = pyarrow.read_table(tmp_path / "x.parquet").to_pylist()
    assert len(rows) == len(table) == len(lines)
    for line, row, record in zip(lines, rows, table, strict=True):
        name = line["path"].encode("utf-8", "backslashreplace").decode()
        for column in ("key", "question", "answer", "error"):
            assert row[column] == line.get(column, "")
            assert record[column] == line.get(column)
        assert row["path"] == record["path"] == name
        assert (float(row["score"]) if row["score"] else None) == record["score"]
        assert record["score"] == line.get("score")
        assert row["flags"].split() == (record["flags"] or []) == line.get("flags", [])
        assert (json.loads(row["beams"]) if row["beams"] else None) == record["beams"]
        assert record["beams"] == line.get("beams")


def test_shards_are_read_by_webdataset(tmp_path, files):
    """Pictures as they were, of a folder and of a shard; no sample where there is no answer."""
    wds = pytest.importorskip("webdataset")
    shard = tmp_path / "in.tar"
    with wds.TarWriter(str(shard)) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"k{number}", "PNG": Path(file).read_bytes()})
    entries = [*files, str(shard)]
    pictures = answered(files)
    pictures += [lines_of(str(shard), key=f"k{number}.PNG") for number in range(5)]
    target = Target.of(str(tmp_path / "out.tar"), shard_size=3, rule=Rule(-1.0))
    write(target, [], entries, pictures)
    names = [tmp_path / f"out-00000{number}.tar" for number in range(4)]
    assert sorted(tmp_path.glob("out-*.tar")) == names
    samples = list(wds.WebDataset([str(name) for name in names], shardshuffle=False))
    numbers = [number for number in range(10) if number != 2]
    assert [sample["__key__"] for sample in samples] == [f"{number:09}" for number in numbers]
    for number, sample in zip(numbers, samples, strict=True):
        suffix = Path(files[number % 5]).suffix[1:] if number < 5 else "png"
        assert sample[suffix] == Path(files[number % 5]).read_bytes()
        kept = pictures[number][0]
        assert sample["txt"].decode() == kept["answer"]
        told = json.loads(sample["json"])
        assert told["path"] == kept["path"]
        assert told.get("key") == kept.get("key")
        assert [answer["score"] for answer in told["answers"]] == [-0.25]
    rejected = read(tmp_path / "out.rejected.jsonl")
    assert len(rejected) == 9
    assert {line["question"] for line in rejected} == {"q"}


def test_shards_that_are_whole_are_not_written_again(tmp_path, files):
    pictures = answered(files)
    target = Target.of(str(tmp_path / "out.tar"), shard_size=2)
    write(target, [], files[:3], pictures[:3])
    first, second = sorted(tmp_path.glob("out-*.tar"))
    kept = first.stat().st_mtime_ns, first.stat().st_ino
    half = second.read_bytes()
    write(target, [], files, pictures)  # the second was not full
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == kept
    assert second.read_bytes() != half
    assert len(sorted(tmp_path.glob("out-*.tar"))) == 3


def test_sidecars_lie_beside_pictures_or_mirror_them(tmp_path, files):
    photos = tmp_path / "photos"
    (photos / "a.txt").write_text("mine")
    target = Target.of(str(photos))
    write(target, [str(photos)], files, answered(files))
    assert (photos / "a.txt").read_text() == "mine"
    answer = f'a, "b"\nof {files[1]}'
    assert (photos / "sub" / "b.txt").read_text() == f"{answer}\nno no no\n"
    assert (photos / "sub" / "deep" / "e.txt").is_file()
    assert not (photos / "c.txt").exists()
    assert (photos / NASTY.replace(".png", ".txt")).is_file()
    write(Target.of(str(photos), overwrite=True), [str(photos)], files, answered(files))
    assert files[0] in (photos / "a.txt").read_text()
    mirror = Target.of(f"{tmp_path}/other/", rule=Rule(flags=["loop"]))
    pictures = [*answered(files), lines_of("in/s-000.tar", key="../x/1.jpg")]
    write(mirror, [str(photos)], files, pictures)
    found = {str(p.relative_to(tmp_path / "other")) for p in (tmp_path / "other").rglob("*.txt")}
    names = {"a.txt", "sub/b.txt", "sub/deep/e.txt", NASTY.replace(".png", ".txt")}
    assert found == {*names, "s-000/__/x/1.txt"}
    assert (tmp_path / "other" / "sub" / "b.txt").read_text() == answer + "\n"


def test_two_pictures_with_one_sidecar_are_refused(tmp_path):
    sidecars = Sidecars(tmp_path, ["photos"], overwrite=False)
    sidecars.check(["photos/a.jpg", "photos/b/a.jpg", "a/c.jpg"])
    for pair in (["photos/a.jpg", "photos/a.png"], ["x/a.jpg", "y/a.jpg"]):
        with pytest.raises(Blip2Error, match=rf"{pair[0]} and {pair[1]} would both have"):
            sidecars.check(pair)


@pytest.mark.parametrize("form", ["x.csv", "x.parquet", "x.tar", "x.jsonl"])
def test_files_of_others_are_not_replaced(tmp_path, form):
    there = tmp_path / form.replace(".tar", "-000000.tar")
    there.write_text("mine")
    rule = Rule(-1.0) if form == "x.jsonl" else Rule()
    with pytest.raises(Blip2Error, match=rf"{there.name} exists and has no {form}\.journal"):
        Target.of(str(tmp_path / form), rule=rule).check()
    (tmp_path / "y.rejected.jsonl").write_text("mine")
    with pytest.raises(Blip2Error, match=r"y\.rejected\.jsonl exists"):
        Target.of(str(tmp_path / "y.csv"), rule=Rule(-1.0)).check()


def test_full_disks_are_one_sentence(tmp_path, files, monkeypatch):
    target = Target.of(str(tmp_path / "x.csv"))
    monkeypatch.setattr("blip2.many.formats.Csv.flush", full)
    with pytest.raises(Blip2Error, match=r"cannot write .*x\.csv: No space left on device; mend"):
        write(target, [], files, answered(files))


def full(_writer) -> None:
    with open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")


@pytest.mark.parametrize(
    ("line", "rule", "is_rejected"),
    [
        ({"score": -1.0, "flags": []}, Rule(-1.0), False),
        ({"score": -1.01, "flags": []}, Rule(-1.0), True),
        ({"score": -9.0, "flags": ["loop"]}, Rule(), False),
        ({"score": 0.0, "flags": ["loop"]}, Rule(-1.0, ["empty", "loop"]), True),
        ({"score": 0.0, "flags": ["length"]}, Rule(-1.0, ["empty", "loop"]), False),
        ({"error": "e"}, Rule(-1.0, ["empty"]), False),
    ],
)
def test_rules(line, rule, is_rejected):
    assert rule.rejects(line) == is_rejected


def test_parts_of_an_input_are_the_input():
    entries = [str(number) for number in range(103)]
    parts = [inputs.part_of(entries, n, n, 10) for n in range(10)]
    assert [entry for part in parts for entry in part] == entries
    assert {len(part) for part in parts} == {10, 11}
    assert inputs.part_of(entries, 2, 5, 10) == [e for part in parts[2:6] for e in part]
    with pytest.raises(Blip2Error, match="are empty; give `shards` fewer parts"):
        inputs.part_of(["a"], 0, 0, 5)


ARGUMENTS = ("--batch_size", 2, "--min_score", -5.0, "--temperature", 3.0, "--seed", 3)


_SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in FORMS if f not in ("x.jsonl", "x.tar")]


@pytest.mark.parametrize("form", ["x.jsonl", "x.tar", *_SLOW])
def test_programs_that_are_killed_go_on(demo_opt, photos, tmp_path, form):
    """kill -9 at random moments, of sampled answers, of which some are rejected."""
    if form == "x.parquet":
        pytest.importorskip("pyarrow")
    asked = ("--input_dir", photos, *ARGUMENTS, "--shard_size", 4, "--max_output_len", 8)
    if form != "x.tar":
        asked = tuple(a for a in asked if a not in ("--shard_size", 4))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    output = f"{parts}/{form}"
    journal = Target.of(output, rule=RULE).journal
    done = run_program(*command(demo_opt, f"{whole}/{form}", *asked))
    assert done.returncode == 0, done.stderr
    for lines in (1, 5):
        process = start_program(*command(demo_opt, output, *asked))
        assert wait_for(
            lambda n=lines: journal.exists() and journal.read_bytes().count(b"\n") >= n, 60
        )
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    done = run_program(*command(demo_opt, output, *asked))
    assert done.returncode == 0, done.stderr
    expected = outputs_in(whole)
    assert outputs_in(parts) == expected
    if form == "x.jsonl":
        kept, rejected = (read(whole / name) for name in ("x.jsonl", "x.rejected.jsonl"))
        assert min(line["score"] for line in kept) >= -5 > max(line["score"] for line in rejected)
        assert len(kept) + len(rejected) == SCENES


def test_errors_asked_about_again_are_in_the_outputs(demo_opt, tmp_path):
    """With parts of an input, too: two pictures of nine."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        scene(number).image.save(folder / f"{number}.png")
    (folder / "3.png").write_text("no picture")
    asked = ("--input_dir", folder, "--shards", "1..2/3", "--shard_size", 3)
    output = tmp_path / "x.tar"
    done = run_program(*command(demo_opt, output, *asked))
    assert done.returncode == 1, done.stderr
    scene(3).image.save(folder / "3.png")
    done = run_program(*command(demo_opt, output, *asked, "--retry_errors"))
    assert done.returncode == 0, done.stderr
    texts = []
    for shard in sorted(tmp_path.glob("x-*.tar")):
        with tarfile.open(shard) as opened:
            texts += [opened.extractfile(m).read() for m in opened if m.name.endswith(".txt")]
    assert [text.decode() for text in texts] == [scenes.caption(scene(n)) for n in range(2, 6)]
    refused = run_program(*command(demo_opt, output, *asked[:2], "--shards", "0/3"))
    assert "begun with another --shard" in refused.stderr
    for wrong in ("3/3", "2..1/3", "a", "-1/3"):
        refused = run_program(*command(demo_opt, output, *asked[:2], f"--shards={wrong}"))
        assert refused.returncode == 2
        assert "are no parts A..B/N" in refused.stderr

"""What bench.real judges and reports, of results made up; what it needs of a machine."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys

import pytest
from conftest import ROOT

from bench.published import PRECISIONS, claims, pictures, report
from bench.published.needs import GB, Machine, Needs, Sizes
from bench.published.steps import Step, Steps
from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error

DEMO = ROOT / "demo" / "checkpoint"


def config() -> dict:
    return json.loads((DEMO / "config.json").read_text())


def test_sizes_are_those_of_the_weights():
    checkpoint, sizes = open_checkpoint(DEMO), Sizes.of(config(), DEMO)
    counted = dict.fromkeys(("vision", "language", "other"), 0)
    for name in checkpoint.names:
        kind = name.split("_")[0] if name.startswith(("vision_", "language_model")) else "other"
        counted[kind] += math.prod(checkpoint.shape(name))
    found = {"vision": sizes.vit, "language": sizes.opt, "other": sizes.qformer}
    for kind, number in counted.items():
        assert found[kind] == pytest.approx(number, rel=0.02), kind


def full_size() -> Sizes:
    return Sizes(985_212_800, 106_954_752, 2_650_603_520, 257)


def machine(memory: float, gpu_memory: float | None = None) -> Machine:
    gpu = None if gpu_memory is None else gpu_memory * GB
    return Machine(memory * GB, gpu, 150e9, 20e9)


def needs(here: Machine, download: float = 15 * GB) -> Needs:
    return Needs.of(full_size(), here, download, 26, 20)


def test_what_does_not_fit_is_refused_or_left_out(tmp_path):
    small, medium, large = machine(4), machine(9), machine(64)
    with pytest.raises(Blip2Error, match=r"the export needs 5.1 GB of memory, 4.0 are free; close"):
        needs(small).check(small, tmp_path, tmp_path)
    needs(medium, 0).check(medium, tmp_path, tmp_path)
    assert needs(medium).lacks("float16", medium) == "needs 10.7 GB of memory, 9.0 are free"
    assert needs(medium).lacks("int8", medium) is None
    assert needs(medium).reference_device(medium) is None
    assert needs(large).reference_device(large) == "cpu"
    for gpu_memory, device in ((12, "cpu"), (40, "cuda")):
        here = machine(64, gpu_memory)
        assert needs(here).reference_device(here) == device
        assert needs(here).lacks("float16", here) is None
    here = machine(64, 3)
    assert "needs" in needs(here).lacks("int4", here)
    with pytest.raises(Blip2Error, match=r"even OPT in int4 needs .* of GPU memory, 3.0 are free"):
        needs(here).check(here, tmp_path, tmp_path)


def test_too_little_disk_is_refused_in_one_line(tmp_path, monkeypatch):
    here = machine(64)
    free = dataclasses.make_dataclass("Usage", ["free"])(20 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        Blip2Error, match=r"25.1 GB of disk are needed at .*, 20.0 are free \(25.1 GB \(download 15"
    ):
        needs(here).check(here, tmp_path / "not" / "made", tmp_path)
    needs(here, 0).check(here, tmp_path, tmp_path)


# Claims, of results made up.
def result(**changes: object) -> dict:
    """As bench.published.reference writes it: one picture, one question, asked twice."""
    answer = {"file": "a.png", "prompt": "Question: which city is this? Answer:"}
    greedy = {"decoding": "greedy", "ids": [5, 6], "text": "singapore", "log_prob": -0.5}
    beams = {"decoding": "beams", "ids": [5, 7], "text": "the city", "log_prob": -0.4}
    return {
        "dtype": "float32",
        "load_seconds": 1.0,
        "answers": [{**answer, **greedy, "gaps": [3.0, 2.0, 0.01]}, {**answer, **beams}],
        "seconds": {
            "ViT": [0.1],
            "Q-Former": [0.1],
            "picture to answer, greedy": [1.0],
            "picture to answer, beams": [2.0],
        },
        "pixels": {"a.png": "hash"},
        "prompts": {answer["prompt"]: [2, 9]},
        "errors": {"a.png": [1e-3, 2e-3]},
        **changes,
    }


def faster(**changes: object) -> dict:
    seconds = {name: [0.5 * t for t in times] for name, times in result()["seconds"].items()}
    return result(**{"seconds": seconds, **changes})


def steps(ours: dict, **changes: Step) -> dict[str, Step]:
    """A run in which everything succeeded, but for `changes`."""
    run = {"text": "singapore"}
    found = [
        Step("transformers", result=result()),
        Step("export"),
        Step("ViT in INT8", printed="relative error 5e-2"),
        Step("checkpoint: run", result=run),
    ]
    for number, precision in enumerate(PRECISIONS):
        found += [Step(f"{precision}: convert"), Step(f"{precision}: run", result=run)]
        memory = (10 - number) * 10**9
        found.append(Step(f"{precision}: answers", result=ours, memory=memory))
    return {**{step.name: step for step in found}, **changes}


def judged(found: dict[str, Step], city: str | None = "singapore") -> dict[str, str]:
    """The outcomes that are not "pass", by the claim's first words."""
    all_ = claims.judge(found, PRECISIONS, city, on_gpu=False)
    return {c.text: c.outcome for c in all_ if c.outcome != claims.PASS}


def changed(index: int, **fields: object) -> dict:
    """Results with another answer."""
    answers = [dict(answer) for answer in result()["answers"]]
    answers[index] |= fields
    return faster(answers=answers)


def test_all_claims_pass_where_all_is_well():
    assert judged(steps(faster())) == {}


@pytest.mark.parametrize(
    "ours, claim",
    [
        (faster(pixels={"a.png": "other"}), "Pictures are prepared"),
        (faster(prompts={"Question: which city is this? Answer:": [2, 8]}), "Prompts have the ids"),
        (faster(errors={"a.png": [1e-3, 2e-2]}), "The ViT and the Q-Former"),
        (changed(0, ids=[5, 9]), "Greedy answers in float16"),
        (changed(0, ids=[5]), "Greedy answers in float16"),
        (changed(1, ids=[5, 9], log_prob=-0.6), "So have those of 5 beams"),
        (changed(0, log_prob=-0.6), "Log probabilities"),
        (result(), "From a picture to one answer"),
    ],
)
def test_a_claim_fails_where_it_does_not_hold(ours, claim):
    found = judged(steps(ours))
    assert set(found.values()) == {claims.FAIL}
    assert any(text.startswith(claim) for text in found)
    assert len(found) == (2 if claim.startswith("From") else 1)


@pytest.mark.parametrize(
    "ours", [changed(0, ids=[5, 6, 7]), changed(1, ids=[5, 9], log_prob=-0.41)]
)
def test_a_tie_is_no_failure(ours):
    """transformers' two likeliest tokens were as good as equal where the answers part."""
    assert judged(steps(ours)) == {}


def test_what_fails_and_what_is_not_tried_is_told_apart():
    failed = Step("int4: answers", failed="error: not enough memory")
    found = judged(steps(faster(), **{"int4: answers": failed}))
    assert found == {"It is converted, and answers, in int4": claims.FAIL}
    skipped = Step("transformers", failed="not tried: in float32 it needs 16.0 GB of memory")
    found = judged(steps(faster(), transformers=skipped), city=None)
    assert set(found.values()) == {claims.NOT_TRIED}
    assert len(found) == 9
    wrong = Step("float16: run", result={"text": "paris"})
    found = judged(steps(faster(), **{"float16: run": wrong}))
    assert len(found) == 2
    assert set(found.values()) == {claims.FAIL}
    refused = Step("ViT in INT8", failed="error: int8 would take the ViT 20 % off; use float16")
    assert judged(steps(faster(), **{"ViT in INT8": refused})) == {}
    crashed = Step("ViT in INT8", failed="Segmentation fault")
    assert list(judged(steps(faster(), **{"ViT in INT8": crashed})).values()) == [claims.FAIL]


def test_the_report_has_answers_side_by_side():
    found = steps(changed(0, text="a | b\nc"))
    items = [pictures.Item("a.png", "Question: which city is this? Answer:")]
    all_ = claims.judge(found, PRECISIONS, "paris", on_gpu=False)
    text = report.markdown("somebody/blip2", "8 files", "disk: 1 GB", all_, found, items)
    assert text.startswith("# somebody/blip2: 15 claims pass, 1 fail, 0 not tried")
    assert "| a: Question: which city is this? Answer: | singapore | a \\| b c | a" in text
    assert "| float16 | 1 of 1 have the same ids | 1 of 1 have the same ids | 1.0e-03 |" in text
    assert "| picture to answer, greedy | 1000.0 | 500.0 | 500.0 | 500.0 |" in text
    assert "| OPT, greedy | 800.0 | 400.0 |" in text
    assert "**FAIL**" in text


def test_a_step_that_failed_is_tried_again_and_one_whose_files_are_gone(tmp_path, capfd):
    made = tmp_path / "made.txt"
    script = f"import sys; open({str(made)!r}, 'w'); print('done'); sys.exit(int(sys.argv[1]))"

    def run(code: int) -> Step:
        with Steps(tmp_path / "steps.jsonl", {"--a": 1}) as journal:
            return journal.command("step", [sys.executable, "-c", script, code], made=made)

    assert run(3).failed == "done"
    assert not run(0).failed
    capfd.readouterr()
    assert run(3).printed == "done"
    assert "-- step: done before" in capfd.readouterr().out
    made.unlink()
    assert run(3).failed

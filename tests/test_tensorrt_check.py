"""bench.tensorrt_check, rehearsed on the doubles of TensorRT and TensorRT-LLM."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import transformers
from conftest import ROOT
from trtllm_engines import DOUBLES, forget_double, install_double

from bench import tensorrt_check
from blip2.errors import Blip2Error

pytest.importorskip("tensorrt_rtx", reason="plans are built with: pip install tensorrt-rtx")
CHECKPOINT = ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    """The demo's OPT by itself: what the engines of the double compute."""
    directory = tmp_path_factory.mktemp("opt")
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(CHECKPOINT)
    model.language_model.save_pretrained(directory)
    return directory


@pytest.fixture
def check(monkeypatch, tmp_path, opt, capfd):
    """Run the program in the environment of the doubles; its exit code, output, and table."""

    def check(*arguments: object, version: str = "1.2.1", **environment: str):
        install_double(monkeypatch, tmp_path / "site", version)
        places = (tmp_path / "site" / version, DOUBLES, ROOT / "tests")
        for name, value in {
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            "PATH": f"{DOUBLES / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "DOUBLE_OPT": str(opt),
            "DOUBLE_CHECKPOINT": str(CHECKPOINT),
            **environment,
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tensorrt_check, "RUN", ROOT / "tests" / "run_on_doubles.py")
        monkeypatch.setattr(sys, "argv", ["tensorrt_check", *map(str, arguments)])
        code = tensorrt_check.main()
        out = capfd.readouterr().out
        return code, out, out[out.rindex("\nleg ") :].strip().splitlines()

    yield check
    forget_double()


def results(rows: list[str]) -> dict[str, str]:
    """Of each leg in the table, whether it passed."""
    found = (re.fullmatch(r"(.*?) +(pass|FAIL|skipped)\b.*", row) for row in rows[1:-1])
    return {leg[1]: leg[2] for leg in found}


ASKED = "3 pictures, 5 beams"


@pytest.mark.parametrize(
    "batch, beams, name", [(1, 5, "what, 1 picture, 5 beams"), (3, 1, "what, 3 pictures, 1 beam")]
)
def test_names_of_legs(batch, beams, name):
    assert tensorrt_check._asked_name("what", batch, beams) == name


@pytest.mark.slow
@pytest.mark.parametrize("precisions", [["fp16"], ["fp16", "int4"]], ids="+".join)
def test_every_leg_is_tried_and_a_failure_does_not_end_it(check, tmp_path, monkeypatch, precisions):
    """INT4 cannot be built, on this "GPU"; all else passes."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code, out, rows = check(
        *("--native_python", os.path.relpath(sys.executable), "--directory", tmp_path / "made"),
        *("--precision", *precisions, "--batch_size", 3, "--num_beams", 5, "--benchmark", 1),
        DOUBLE_BUILD_FAILS="W4A16",
    )
    passed = [
        *("import tensorrt_llm", "export", "plans", "fp16: convert"),
        *(f"fp16: native, {ASKED}", f"fp16: plans, native OPT, {ASKED}"),
        *("fp16, paged: trtllm-build", f"fp16, paged: plans, engine, {ASKED}"),
        *("fp16, continuous: trtllm-build", f"fp16, continuous: plans, engine, {ASKED}"),
    ]
    expected, ended = dict.fromkeys(passed, "pass"), (0, "10 passed, 0 failed, 0 skipped")
    if "int4" in precisions:
        passed = ("convert", f"native, {ASKED}", f"plans, native OPT, {ASKED}")
        expected |= dict.fromkeys((f"int4: {leg}" for leg in passed), "pass")
        expected["int4, paged: trtllm-build"] = "FAIL"
        expected[f"int4, paged: plans, engine, {ASKED}"] = "skipped"
        ended = (1, "13 passed, 1 failed, 1 skipped")
        [row] = [row for row in rows if row.startswith("int4, paged: trtllm-build")]
        assert row.endswith("Weight Only Quant MatMul is not supported on this GPU (W4A16)")
    assert results(rows) == expected, out
    assert (code, rows[-1]) == ended
    assert not list(here.iterdir())
    [row] = [row for row in rows if row.startswith("fp16, paged: plans, engine")]
    assert re.search(r"( +\d+\.\d+){4}    3 of 3 as native, 1\d of 15 beams", row), row
    assert re.search(r"^  tensorrt_llm 1\.2\.1$", out, re.MULTILINE)  # versions
    assert re.search(r"^\$ .*trtllm-build --checkpoint_dir", out, re.MULTILINE)  # commands
    assert "[TensorRT-LLM] TensorRT-LLM version: 1.2.1" in out  # and what they print
    for kind in ("paged", "continuous"):
        config = json.loads((tmp_path / "made/engine/fp16" / kind / "config.json").read_text())
        assert config["build_config"]["kv_cache_type"] == kind


def test_where_nothing_works_every_leg_says_so(check, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho it is broken >&2; exit 1")
    broken.chmod(0o755)
    code, out, rows = check(
        *("--native_python", broken, "--precision", "fp16", "int8"),
        PYTHONPATH="",
    )
    assert code == 1
    failed = ["import tensorrt_llm", "export", "fp16: convert", "int8: convert"]
    assert results(rows) == {**dict.fromkeys(failed, "FAIL"), "plans": "skipped"}
    assert "ModuleNotFoundError: No module named 'tensorrt_llm'" in rows[1]
    assert rows[2].endswith("it is broken")
    assert "Traceback" in out  # what Python printed, whole


@pytest.mark.slow
def test_engines_are_tried_though_plans_do_not_run(check, opt):
    """The checkpoint behind the plans' double is another one's: they fail when they run."""
    code, out, rows = check(
        *("--native_python", sys.executable, "--precision", "fp16", "--batch_size", 1),
        *("--num_beams", 1, "--benchmark", 1),
        version="1.0.0",
        DOUBLE_CHECKPOINT=str(opt),
    )
    found = results(rows)
    failed = [leg for leg, result in found.items() if result != "pass"]
    assert (code, failed) == (1, ["fp16: plans, native OPT, 1 picture, 1 beam"]), out
    assert found["fp16, paged: native ViT, engine, 1 picture, 1 beam"] == "pass"
    assert found["fp16, continuous: native ViT, engine, 1 picture, 1 beam"] == "pass"


def answer(*texts: str) -> list[dict]:
    return [{"text": text} for text in texts]


@pytest.mark.parametrize(
    "answers, expected, same, detail",
    [
        ([answer("a")], [answer("a")], True, "1 of 1 as native"),
        (
            [answer("a", "c", "b"), answer("d", "e", "f")],
            [answer("a", "b", "c"), answer("d", "e", "f")],
            True,
            "2 of 2 as native, 4 of 6 beams",
        ),
        (
            [answer("a"), answer("a")],
            [answer("a"), answer("b")],
            False,
            "1 of 2 as native; 'a', natively 'b'",
        ),
        ([answer("a")], [answer("a"), answer("b")], False, "1 of 2 as native"),
    ],
)
def test_what_counts_as_the_same(answers, expected, same, detail):
    assert tensorrt_check.compare(answers, expected) == (same, detail)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("--directory", "."), "exists; name another --directory"),
        (("--native_python", "no/python"), "--native_python no/python cannot be run; name a"),
    ],
)
def test_mistakes_are_refused_before_any_work(monkeypatch, arguments, match):
    monkeypatch.setattr(sys, "argv", ["tensorrt_check", *arguments])
    with pytest.raises(Blip2Error, match=match):
        tensorrt_check.main()

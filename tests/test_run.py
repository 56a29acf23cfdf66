"""run.py from the outside: the same answers as transformers' generate, and clear refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_program

import blip2
from blip2.engines import Places
from blip2.pipeline import open_pipeline

QUESTION = "Question: what is it? Answer:"


def ask(tiny_export, tiny_opt, *arguments):
    return run_program(
        "run.py",
        *("--engine_dir", tiny_export.output / "onnx", "--opt_engine_dir", tiny_opt),
        *("--query_tokens", tiny_export.output / "query_tokens.pt"),
        *("--input_dir", tiny_export.output / "image.pt"),
        *arguments,
    )


def transformers_answers(
    tiny_export, text: str, **options
) -> tuple[list[str], list[float], list[bool]]:
    """What Blip2ForConditionalGeneration says of the saved picture: texts, beam scores, ends."""
    from models import tiny_tokenizer

    tokenizer, model = tiny_tokenizer(), tiny_export.model
    pixel_values = torch.load(tiny_export.output / "image.pt", weights_only=True)
    ids = [300] * model.config.num_query_tokens + [2, *tokenizer.encode(text).ids]
    newline = tokenizer.encode("\n").ids[0]
    result = model.generate(
        pixel_values=pixel_values,
        input_ids=torch.tensor([ids]),
        eos_token_id=newline,
        pad_token_id=1,
        num_return_sequences=options.get("num_beams", 1),
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
        **options,
    )
    texts, ended = [], []
    for sequence in result.sequences.tolist():
        new = sequence[len(ids) :]
        ended.append(newline in new)
        new = new[: new.index(newline)] if newline in new else new
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    scores = result.sequences_scores.tolist() if "sequences_scores" in result else []
    return texts, scores, ended


@pytest.mark.parametrize("text", [QUESTION, "what is it?", "", "a photo of"])
def test_greedy_answers_are_transformers(tiny_export, tiny_opt, text):
    prompt = {"what is it?": QUESTION}.get(text, text)
    literal = ["--prompt_template", "{}"] if text == "a photo of" else []
    done = ask(
        *(tiny_export, tiny_opt, "--input_text", text, "--max_output_len", 12, "--json"), *literal
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["question"], result["prompt"]) == (text, prompt)
    texts, _, ended = transformers_answers(tiny_export, prompt, max_new_tokens=12)
    [beams] = result["answers"]
    assert [beam["text"] for beam in beams] == texts
    assert ["length" not in beam["flags"] for beam in beams] == ended


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_and_scores_are_transformers(tiny_export, tiny_opt, num_beams):
    done = ask(
        *(tiny_export, tiny_opt, "--input_text", QUESTION, "--max_output_len", 8, "--json"),
        *("--num_beams", num_beams, "--length_penalty", 0.6),
    )
    assert done.returncode == 0, done.stderr
    [beams] = json.loads(done.stdout)["answers"]
    texts, scores, ended = transformers_answers(
        tiny_export, QUESTION, max_new_tokens=8, num_beams=num_beams, length_penalty=0.6
    )
    assert ["length" not in beam["flags"] for beam in beams] == ended
    assert [beam["text"] for beam in beams] == texts
    assert [beam["score"] for beam in beams] == pytest.approx(scores, rel=1e-4)


def test_a_picture_gives_the_same_as_its_image_pt(tiny_export, tiny_opt):
    arguments = (tiny_export, tiny_opt, "--input_text", QUESTION, "--json")
    saved, drawn = ask(*arguments), ask(*arguments, "--input_dir", tiny_export.picture)
    assert json.loads(saved.stdout)["answers"] == json.loads(drawn.stdout)["answers"]


def test_printout_has_question_answers_and_stages(tiny_export, tiny_opt):
    done = ask(tiny_export, tiny_opt, "--input_text", QUESTION, "--num_beams", 3)
    lines = done.stdout.splitlines()
    assert lines[0] == f"[Q] {QUESTION}"
    assert [line[:3] for line in lines].count("[A]") == 3
    stages = [line.split("  ")[0] for line in lines if line.endswith("%")]
    assert stages == [
        *("start", "load engines", "load picture", "ViT", "Q-Former", "OPT", "other", "total")
    ]


def test_benchmark_gives_medians_of_the_stages(tiny_export, tiny_opt):
    done = ask(tiny_export, tiny_opt, "--input_text", "", "--benchmark", 3, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == 3
    assert list(result["seconds"]) == ["ViT", "Q-Former", "OPT"]


def test_sampling_follows_its_seed(tiny_export, tiny_opt):
    def sample(seed: int) -> str:
        done = ask(
            *(tiny_export, tiny_opt, "--input_text", "", "--json", "--seed", seed),
            *("--top_p", 0.95, "--temperature", 2.0, "--max_output_len", 20),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["answers"]

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)


# Prints what a script's --help or --version imports besides the standard library.
HELP = """
import runpy, sys
before = set(sys.modules)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(imported - set(sys.stdlib_module_names)))
"""


SCRIPTS = ["run.py", "onnx_export.py", "build_vit_qformer.py", "opt/convert_checkpoint.py"]
HEAVY = {"torch", "tensorrt", "transformers", "onnx", "onnxruntime"}


@pytest.mark.parametrize(
    "script", [*SCRIPTS, "serve.py", "demo/draw.py", "demo/evaluate.py", "demo/train.py"]
)
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(script, flag):
    """What makes them immediate."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, script, flag], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *said, imported = done.stdout.splitlines()
    if script in SCRIPTS:
        assert imported == "blip2"
    assert not HEAVY & set(imported.split())
    if flag == "--version":
        assert said == [f"blip2-suite {blip2.__version__}"]


def test_every_program_says_its_version():
    """The parser that all share does: no program has another one."""
    folders = ("bench", "blip2", "demo", "opt")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = [path for path in sources if "argparse.ArgumentParser(" in path.read_text()]
    assert not own


def test_another_tokenizer_keeps_the_ids_beside_the_engines(tiny_export, tiny_opt, tmp_path):
    """--hf_model_location may be facebook's OPT, which knows nothing of where BLIP-2's answers end."""
    exported = shutil.copytree(tiny_export.output, tmp_path / "exported")
    other = shutil.copytree(exported / "tokenizer", tmp_path / "other")
    (other / "generation_config.json").unlink()
    ids = exported / "tokenizer" / "generation_config.json"
    assert json.loads(ids.read_text()) == {"bos_token_id": 2, "eos_token_id": 202}
    ids.write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 3}))
    query_tokens = exported / "query_tokens.pt"
    for tokenizer in (None, other):
        pipeline = open_pipeline(Places.of(exported / "onnx", tiny_opt, query_tokens, tokenizer))
        assert pipeline.options({}).end_id == 3


SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def test_no_library_sends_anything_or_keeps_an_id(tiny_export, tiny_opt, tmp_path, monkeypatch):
    """onnxruntime has written its id below the home directory by the end of a session."""
    for name in ("XDG_CACHE_HOME", *SWITCHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = ask(tiny_export, tiny_opt, "--input_text", "")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob(".*/*")} <= {"blip2"}
    printed = subprocess.run(
        [sys.executable, "-c", f"import blip2, os; print(*map(os.environ.get, {list(SWITCHES)}))"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert printed.stdout.split() == list(SWITCHES.values())

"""The Python API: documented examples, and answers that are Hugging Face's."""

from __future__ import annotations

import doctest
import gc
import itertools
import pickle
import threading

import numpy as np
import pytest
import torch
from batch_runs import CHECKPOINT, scene
from conftest import ROOT, run_program
from PIL import Image
from transformers import Blip2ForConditionalGeneration

import blip2
from blip2.checkpoints import open_checkpoint
from blip2.engine.request import pieces
from blip2.images import Preprocessing, pixel_values
from blip2.pipeline import Pipeline
from blip2.prompts import load_tokenizer

QUESTIONS = ["What colour is the circle?", ""]


@pytest.fixture(scope="module")
def model() -> blip2.Model:
    return blip2.load(CHECKPOINT)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [scene(number).image for number in range(3)]


@pytest.fixture(scope="module")
def told(pictures) -> dict[tuple[int, str], str]:
    """What transformers' model answers, by picture and question: greedily, in float32."""
    reference = Blip2ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    preprocessing = Preprocessing.of(open_checkpoint(CHECKPOINT))
    tokenizer = load_tokenizer(CHECKPOINT)
    words = reference.language_model.get_input_embeddings()
    answers = {}
    for number, picture in enumerate(pictures):
        seen = reference.vision_model(pixel_values(picture, preprocessing)[None]).last_hidden_state
        looked = reference.qformer(
            query_embeds=reference.query_tokens, encoder_hidden_states=seen
        ).last_hidden_state
        for question in QUESTIONS:
            prompt = tokenizer.encode(f"Question: {question} Answer:" if question else "")
            read = [reference.language_projection(looked), words(torch.tensor([prompt]))]
            ids = reference.language_model.generate(
                inputs_embeds=torch.cat(read, dim=1),
                max_new_tokens=30,
                do_sample=False,
                eos_token_id=tokenizer.end_id,
            )[0].tolist()
            answers[number, question] = tokenizer.decode(ids)
    return answers


def test_the_page_of_examples_holds(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert result.attempted > 20
    assert not result.failed


@pytest.mark.parametrize("precision", [None, "float16"])
def test_answers_are_transformers(model, pictures, told, precision):
    if precision is not None:
        model = blip2.load(CHECKPOINT, CHECKPOINT, precision=precision, device="cpu")
    for question in QUESTIONS:
        expected = [told[number, question] for number in range(3)]
        assert [answer.text for answer in model.ask(pictures, question)] == expected
    pairs = [(pictures[n], question) for n in (2, 0) for question in QUESTIONS]
    answers = model.ask(*map(list, zip(*pairs, strict=True)))
    assert list(map(str, answers)) == [told[n, question] for n in (2, 0) for question in QUESTIONS]
    assert str(model.caption(pictures[1])) == told[1, ""]


def test_a_long_list_is_answered_in_batches(model, pictures, told, monkeypatch):
    looks, look = [], model._pipeline.look

    def counted(values, watch):
        looks.append(len(values))
        return look(values, watch)

    monkeypatch.setattr(type(model._pipeline), "look", lambda _, *rest: counted(*rest))
    numbers = [0, 1, 2, 1, 0] * 8
    answers = model.ask([pictures[n] for n in numbers], QUESTIONS[0])
    assert list(map(str, answers)) == [told[n, QUESTIONS[0]] for n in numbers]
    assert sum(looks) == 3  # each picture once
    assert model.ask([], QUESTIONS[0]) == model.caption([]) == []


def test_sampling_draws_anew_for_every_request(model, pictures):
    how = {"temperature": 3.0, "seed": 5, "max_output_len": 12}
    texts = [a.text for a in model.caption([pictures[0]] * 20, **how)]
    assert len(set(texts)) > 15
    assert texts == [a.text for a in model.caption([pictures[0]] * 20, **how)]
    assert texts[17] != texts[1]


def test_an_answer_may_begin_and_end_where_it_is_told(model, pictures, told):
    whole = told[0, ""]
    words = whole.split()
    start = " ".join(words[:2])
    rest = model.caption(pictures[0], prefix=start)
    assert f"{start} {rest}" == whole
    assert (rest.finished, rest.flags) == (True, [])
    kept = model.caption(pictures[0], prefix=f" {start} ", keep_prefix=True)
    assert (kept.text, kept.score) == (whole, pytest.approx(rest.score, abs=1e-4))
    stream = model.stream(pictures[0], prefix=start, keep_prefix=True)
    assert "".join(stream) == whole
    answer = model.ask(pictures[0], QUESTIONS[0], prefix="the circle is", keep_prefix=True)
    assert answer.text.startswith("the circle is")
    # Nothing behind what was given is nothing: the newline ends an answer.
    nothing = model.caption(pictures[0], prefix=whole, keep_prefix=True)
    assert (nothing.text, nothing.flags) == (whole, ["empty"])
    for stop in (words[3], [words[3], "triangle"], f" {words[2]} {words[3]}"):
        cut = model.caption(pictures[0], stop=stop)
        assert cut.text == " ".join(words[:4])
        assert (cut.finished, cut.flags) == (True, [])
    assert not model.caption(pictures[0], max_output_len=4).finished


def test_several_answers_are_draws_or_beams(model, pictures):
    how = {"temperature": 3.0, "seed": 5, "max_output_len": 12}
    drawn = model.caption(pictures[0], num_return_sequences=4, **how)
    assert [beam.text for beam in drawn.beams][:1] == [drawn.text]
    assert len({beam.text for beam in drawn.beams}) == 4
    assert drawn.text == model.caption(pictures[0], **how).text
    assert all(beam.score < 0 for beam in drawn.beams)
    beams = model.caption(pictures[0], num_beams=4).beams
    assert model.caption(pictures[0], num_beams=4, num_return_sequences=2).beams == beams[:2]
    with pytest.raises(blip2.Blip2Error, match="a stream is one answer"):
        model.stream(pictures[0], num_return_sequences=2, temperature=1.0)


@pytest.mark.parametrize("how", [{}, {"temperature": 2.0, "top_k": 50, "seed": 3}], ids=str)
def test_a_stream_is_the_answer(model, pictures, how):
    for question in QUESTIONS:
        pieces = list(model.stream(pictures[0], question, **how))
        assert len(pieces) > 1 or question
        assert "".join(pieces) == model.ask(pictures[0], question, **how).text
    first = model.stream(pictures[0], **how)
    second = model.stream(pictures[1], **how)
    texts = ["", ""]
    for pair in itertools.zip_longest(first, second, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pair, strict=True)]
    assert texts == [model.caption(picture, **how).text for picture in pictures[:2]]


def test_a_stream_splits_no_character_and_no_word_ends_early():
    words = [b"caf", b"\xc3", b"\xa9", b" ", b" \xe2\x82", b"\xac", b"!", b"\xf0\x9f"]

    def decode(ids: list[int]) -> str:
        return b"".join(words[i] for i in ids).decode("utf-8", "replace").strip()

    found = list(pieces(iter(range(len(words))), decode))
    assert found == ["caf", "é", "  €", "!", "\N{REPLACEMENT CHARACTER}"]


def test_a_stream_that_nobody_takes_lets_others_ask(model, pictures, told):
    stream = model.stream(pictures[0])
    next(stream)
    assert str(model.ask(pictures[1], QUESTIONS[0])) == told[1, QUESTIONS[0]]
    stream.close()
    never_begun = model.stream(pictures[2])
    assert str(model.ask(pictures[1], QUESTIONS[0])) == told[1, QUESTIONS[0]]
    del never_begun


def test_a_stream_keeps_its_model(pictures, told):
    stream = blip2.load(CHECKPOINT).stream(pictures[0])
    gc.collect()
    assert "".join(stream) == told[0, ""]


def test_threads_get_their_own_answers(model, pictures, told):
    found = {}

    def ask(number: int, question: str) -> None:
        found[number, question] = str(model.ask(pictures[number], question))

    threads = [threading.Thread(target=ask, args=key) for key in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == told


def test_features_are_transformers(model, pictures):
    reference = Blip2ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    preprocessing = Preprocessing.of(open_checkpoint(CHECKPOINT))
    values = torch.stack([pixel_values(picture, preprocessing) for picture in pictures])
    with torch.inference_mode():
        seen = reference.vision_model(values).last_hidden_state
        looked = reference.qformer(
            query_embeds=reference.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen
        ).last_hidden_state
        query_output = reference.language_projection(looked)
    features = model.features(pictures)
    torch.testing.assert_close(features.image_embeds, seen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.query_output, query_output, rtol=1e-4, atol=1e-4)
    kept = features.query_output.clone()
    model.features(pictures[::-1])
    assert torch.equal(features.query_output, kept)


def test_features_are_their_callers(model, pictures, monkeypatch):
    """On a GPU the next look overwrites what this one made."""
    made, look = [], Pipeline.look

    def noting(*arguments):
        made.append(look(*arguments))
        return made[-1]

    monkeypatch.setattr(Pipeline, "look", noting)
    features = model.features(pictures[0])
    kept = features.image_embeds.clone(), features.query_output.clone()
    with torch.inference_mode():
        made[0].image_embeds.zero_(), made[0].query_output.zero_()
    assert torch.equal(features.image_embeds, kept[0])
    assert torch.equal(features.query_output, kept[1])
    assert kept[1].any()


def test_every_kind_of_picture_is_the_same(model, tmp_path):
    turned = Image.effect_noise((40, 60), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    turned.save(path, exif=exif)
    from_file = model.features(str(path)).query_output
    for kind in (
        path,
        path.read_bytes(),
        Image.open(path),
        np.asarray(turned.rotate(-90, expand=1)),
    ):
        assert torch.equal(model.features(kind).query_output, from_file)
    opaque = np.dstack([np.asarray(turned), np.full((60, 40), 255, np.uint8)])
    plain = model.features(np.asarray(turned)).query_output
    assert torch.equal(model.features(opaque).query_output, plain)
    assert not torch.equal(plain, from_file)
    grey = np.asarray(turned.convert("L"))
    assert torch.equal(
        model.features(grey).query_output, model.features(np.dstack([grey] * 3)).query_output
    )


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda model: model.caption(np.zeros((4, 4, 3))), blip2.Blip2Error, "uint8"),
        (lambda model: model.caption(np.zeros((0, 4), np.uint8)), blip2.Blip2Error, "uint8"),
        (lambda model: model.caption(b"no picture"), blip2.Blip2Error, "can be read"),
        (lambda model: model.caption("nowhere.jpg"), blip2.Blip2Error, "does not exist"),
        (lambda model: model.caption(3), TypeError, "int is no picture"),
        (lambda model: model.ask(["a", "b"], ["c"]), ValueError, "no pairs"),
        (
            lambda model: model.caption("demo/scene.png", num_beams=0),
            blip2.Blip2Error,
            "`num_beams` is 0; ",
        ),
        (lambda model: model.caption("demo/scene.png", max_len=3), TypeError, "max_len"),
        (lambda model: model.ask("demo/scene.png", "x" * 5000), blip2.Blip2Error, "input length"),
        (
            lambda model: model.stream("demo/scene.png", num_beams=2),
            blip2.Blip2Error,
            "beam search",
        ),
        (lambda _: blip2.load(CHECKPOINT, precision="fp8"), blip2.Blip2Error, "int8, int4"),
        (lambda _: blip2.load(CHECKPOINT, device="tpu"), blip2.Blip2Error, "'cuda:N'"),
        (lambda _: blip2.load(CHECKPOINT, device="cuda:7"), blip2.Blip2Error, "NVIDIA GPUs here"),
        (
            lambda _: blip2.load("demo/checkpoint/nowhere"),
            blip2.Blip2Error,
            "give `opt_engine_dir` too",
        ),
    ],
)
def test_what_is_wrong_is_said(model, monkeypatch, wrong, error, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(error, match=message):
        wrong(model)


def test_errors_have_parts_that_survive_a_pickle():
    error = blip2.Blip2Error("a; b", "mend it")
    again = pickle.loads(pickle.dumps(error))
    assert (again.problem, again.remedy, str(again)) == ("a; b", "mend it", "a; b; mend it")
    assert str(blip2.Blip2Error("a")) == "a"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_precision_is_what_the_conversion_writes(pictures, tmp_path, precision):
    done = run_program(
        *("opt/convert_checkpoint.py", "--model_dir", CHECKPOINT, "--output_dir", tmp_path / "opt"),
        *("--use_weight_only", "--weight_only_precision", precision),
    )
    assert done.returncode == 0, done.stderr
    converted = blip2.load(CHECKPOINT, tmp_path / "opt")
    rounded = blip2.load(CHECKPOINT, precision=precision)
    ways = [model.caption(pictures, num_beams=3) for model in (converted, rounded)]
    for one, other in zip(*ways, strict=True):
        assert one.text == other.text
        assert one.score == pytest.approx(other.score, rel=1e-3, abs=1e-4)
    assert blip2.load(CHECKPOINT, tmp_path / "opt", precision=precision)
    with pytest.raises(blip2.Blip2Error, match="was not converted to float16"):
        blip2.load(CHECKPOINT, tmp_path / "opt", precision="float16")

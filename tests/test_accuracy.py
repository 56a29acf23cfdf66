"""bench.accuracy on files in COCO's and VQA's own formats, about the demo's scenes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT

from bench import accuracy, caption_score, data_sets, vqa_score
from blip2 import images
from blip2.api import Model
from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.prompts import load_tokenizer
from demo import scenes

pytest.importorskip("pycocoevalcap", reason="pip install -r requirements-accuracy.txt")
CHECKPOINT = ROOT / "demo" / "checkpoint"
SCENES = 6
LAVIS_EVALUATION = (
    ROOT / ".venv-lavis/lib/python3.11/site-packages/lavis/common/vqa_tools/vqa_eval.py"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Both data sets, as their makers lay them out; what people said differs from what is right."""
    directory = tmp_path_factory.mktemp("coco")
    (directory / "val2014").mkdir()
    captions, questions, annotations = [], [], []
    rng, asking = random.Random(0), random.Random(0)
    for number in range(SCENES):
        seed, image_id = scenes.EVALUATION_SEED + number, 391895 + 7 * number
        scene = scenes.draw(seed)
        scene.image.save(directory / f"val2014/COCO_val2014_{image_id:012}.jpg", quality=95)
        right = scenes.caption(scene)
        said = [
            right,
            right.replace(" a ", " one "),
            f"{right.split(' on ')[0]}.",
            "A cat, asleep.",
        ]
        captions += [(image_id, text) for text in said]
        for index, asked in enumerate(scenes.questions(scene, asking)):
            key = image_id * 1000 + index
            questions.append({"image_id": image_id, "question": asked.text, "question_id": key})
            others = rng.choices([asked.answer, f"{asked.answer}.", "a dog", "2"], k=10)
            annotations.append(
                {
                    "question_id": key,
                    "image_id": image_id,
                    "question_type": asked.form,
                    "answer_type": "number" if asked.answer.isdigit() else "other",
                    "multiple_choice_answer": asked.answer,
                    "answers": [
                        {"answer": text, "answer_confidence": "yes", "answer_id": index + 1}
                        for index, text in enumerate(others)
                    ],
                }
            )
    rng.shuffle(questions)
    notes = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)]
    coco = {"images": [{"id": i} for i in dict(captions)], "annotations": notes}
    write(directory / "coco_karpathy_test_gt.json", coco)
    write(directory / data_sets.QUESTIONS, {"questions": questions})
    write(directory / data_sets.ANSWERS, {"annotations": annotations})
    return directory


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def score(monkeypatch, data_dir, tmp_path, capsys):
    """Run the program; its table, and the answers of the first precision in the data set's form."""

    def run(data_set: str, *arguments: object, data_dir: Path = data_dir) -> tuple[str, list[dict]]:
        flags = ("--data_dir", data_dir, "--engine_dir", CHECKPOINT, "--output_dir", tmp_path)
        command = [str(word) for word in ("accuracy", data_set, *flags, *arguments)]
        monkeypatch.setattr(sys, "argv", command)
        accuracy.main()
        found = sorted(tmp_path.glob(f"{data_set}-*.json"))
        return capsys.readouterr().out, json.loads(found[0].read_text())

    return run


def cells(printed: str, row: str) -> dict[str, float]:
    """A row of a Markdown table, by the names of its columns."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines()]
    [head], [found] = ([r for r in rows if r[0] == name] for name in ("OPT as", row))
    return {name: float(cell) for name, cell in zip(head[1:], found[1:], strict=True) if cell}


@pytest.fixture(scope="module")
def model() -> transformers.Blip2ForConditionalGeneration:
    return transformers.Blip2ForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


def generated(model, picture: Path, prompt: str, **decoding: object) -> str:
    """What transformers answers."""
    checkpoint, tokenizer = open_checkpoint(CHECKPOINT), load_tokenizer(CHECKPOINT)
    values = images.pixel_values(images.load_image(picture), Preprocessing.of(checkpoint))
    image_ids = [model.config.image_token_index] * model.config.num_query_tokens
    ids = torch.tensor([image_ids + tokenizer.encode(prompt)])
    with torch.inference_mode():
        found = model.generate(
            pixel_values=values[None],
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=tokenizer.end_id,
            do_sample=False,
            **decoding,
        )
    new = found[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.end_id)] if tokenizer.end_id in new else new)


@needs_java
def test_captions_are_scored_as_by_cocos_own_evaluation(score, data_dir, monkeypatch, tmp_path):
    from pycocoevalcap import eval as evaluation
    from pycocotools.coco import COCO

    class Nothing:
        """In place of scorers that download models."""

        method = staticmethod(str)
        compute_score = staticmethod(lambda *_: (0.0, []))

    printed, results = score("coco", "--precision", "float16", "int4")
    assert len(results) == SCENES
    monkeypatch.setattr(evaluation, "Meteor", Nothing)
    monkeypatch.setattr(evaluation, "Spice", Nothing)
    for precision in ("float16", "int4"):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(data_dir / "coco_karpathy_test_gt.json"))
            judged = evaluation.COCOEvalCap(
                coco, coco.loadRes(str(tmp_path / f"coco-{precision}.json"))
            )
            judged.evaluate()
        names = {"Bleu_1": "BLEU-1", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
        theirs = {ours: 100 * judged.eval[name] for name, ours in names.items()}
        ours = {name: cells(printed, precision)[name] for name in theirs}
        assert ours == pytest.approx(theirs, abs=0.005)
        assert 5 < ours["BLEU-1"] < 95
    assert cells(printed, "published (BLIP-2's paper)") == {"BLEU-4": 43.7, "CIDEr": 145.8}
    assert "the published scores are of pictures of 364 pixels" in printed


def test_without_java_captions_are_scored_too_and_that_is_said(score, monkeypatch):
    monkeypatch.setattr(caption_score.shutil, "which", lambda _: None)
    printed, _ = score("coco", "--precision", "float16")
    assert 5 < cells(printed, "float16")["BLEU-1"] < 95
    assert "without Java words were split by bench.caption_score" in printed


@needs_java
def test_words_are_those_of_the_treebank_tokenizer():
    said = [
        "A man's dog doesn't sit on a well-made couch.",
        "Two people, a boy & a girl; they're (both) smiling!",
        'a "stop" sign -- red and white - at 5:30 p.m.',
        "it costs $5,000 or 3.5 dollars (25% off), can't it?",
        "he said 'hello' to [her] in the u.s., I'd say: a dog...and #1 @ home",
        "the boys' kites are flying",
        "",
        *(scenes.caption(scenes.draw(scenes.EVALUATION_SEED + n)) for n in range(50)),
    ]
    by_java = caption_score._split_by_java(dict(enumerate([text] for text in said)))
    assert [caption_score.split_words(text) for text in said] == [
        text for [text] in by_java.values()
    ]


def test_answers_to_vqa_are_scored_as_by_its_own_evaluation(score, data_dir):
    printed, results = score("vqav2", "--precision", "int8")
    given = {
        note["question_id"]: [answer["answer"] for answer in note["answers"]]
        for note in json.loads((data_dir / data_sets.ANSWERS).read_text())["annotations"]
    }
    assert {result["question_id"] for result in results} == given.keys()
    rights = [100 * vqa_score.accuracy(r["answer"], given[r["question_id"]]) for r in results]
    found = cells(printed, "int8")
    assert found["accuracy"] == pytest.approx(sum(rights) / len(rights), abs=0.005)
    assert 5 < found["accuracy"] < 95
    assert found.keys() == {"accuracy", "number", "other"}


def test_pictures_are_described_as_lavis_asks_for_it(score, data_dir, model):
    """Answers equal transformers' with the prompt, beams and lengths of LAVIS's configurations."""
    _, results = score("coco", "--precision", "float16", "--pictures", 2)
    for result in results:
        picture = data_dir / f"val2014/COCO_val2014_{result['image_id']:012}.jpg"
        decoding = {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30}
        assert result["caption"] == generated(model, picture, "a photo of", **decoding)


def test_questions_are_asked_as_lavis_asks_them(score, data_dir, model):
    """Of the fourth picture, where the length penalty decides one of the answers."""
    printed, results = score("vqav2", "--precision", "float16", "--pictures", 4)
    questions = json.loads((data_dir / data_sets.QUESTIONS).read_text())["questions"]
    asked = {one["question_id"]: one for one in questions}
    fourth = max(asked[result["question_id"]]["image_id"] for result in results)
    for result in results:
        one = asked[result["question_id"]]
        if one["image_id"] == fourth:
            prompt = f"Question: {one['question'].lower()} Short answer:"
            picture = data_dir / f"val2014/COCO_val2014_{fourth:012}.jpg"
            decoding = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": 0.0}
            assert result["answer"] == generated(model, picture, prompt, **decoding)
    assert f"only {len(results)} of {len(questions)} were asked" in printed


@pytest.mark.parametrize(
    "question, asked",
    [
        ("What is (this)?  ", "what is this?"),
        ('Is it 3:30 p.m.? "Yes"; no #1*~!', "is it 330 pm? yes no 1"),
        ("Is the dog's ear up, or down?", "is the dog's ear up, or down?"),
        (" ".join(map(str, range(60))), " ".join(map(str, range(50)))),
    ],
)
def test_questions_are_written_as_lavis_writes_them(question, asked):
    assert data_sets.as_lavis_asks(question) == asked


def test_a_long_prompt_is_cut_to_32_tokens():
    tokenizer = load_tokenizer(CHECKPOINT)
    prompt = f"Question: {'red circle ' * 40}? Short answer:"
    found = accuracy.cut(prompt, tokenizer)
    assert tokenizer.encode(found) == tokenizer.encode(prompt)[:32]
    assert accuracy.cut("a photo of", tokenizer) == "a photo of"


def test_karpathys_own_file_is_read(data_dir, tmp_path):
    content = json.loads((data_dir / "coco_karpathy_test_gt.json").read_text())
    pictures = []
    for number, picture in enumerate(content["images"]):
        texts = [n["caption"] for n in content["annotations"] if n["image_id"] == picture["id"]]
        pictures.append(
            {
                "filepath": "val2014",
                "filename": f"COCO_val2014_{picture['id']:012}.jpg",
                "cocoid": picture["id"],
                "split": "test" if number else "restval",
                "sentences": [{"raw": text, "tokens": []} for text in texts],
            }
        )
    write(tmp_path / "dataset_coco.json", {"images": pictures, "dataset": "coco"})
    ours = data_sets.CocoCaptions(tmp_path)
    theirs = data_sets.CocoCaptions(data_dir)
    assert [item.key for item in ours.items] == [item.key for item in theirs.items[1:]]
    assert {i.picture.relative_to(tmp_path) for i in ours.items} <= {
        i.picture.relative_to(data_dir) for i in theirs.items
    }
    answers = {item.key: "a small red circle on a plain background" for item in ours.items}
    assert ours.score(answers) == theirs.score(answers)


def test_a_run_goes_on_where_it_was_ended(score, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "WINDOW", 4)
    printed, results = score("coco", "--precision", "float16")
    journal = tmp_path / "coco-float16.jsonl"
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:7])
    asked, ask = [], Model.ask
    monkeypatch.setattr(
        Model,
        "ask",
        lambda self, *given, **options: asked.append(given) or ask(self, *given, **options),
    )
    assert score("coco", "--precision", "float16") == (printed, results)
    assert journal.read_bytes() == whole
    assert [len(prompts) for _, prompts in asked] == [SCENES - 4]
    with pytest.raises(Blip2Error, match="was begun with another --data_dir or --pictures"):
        score("coco", "--precision", "float16", "--pictures", 3)


# What the evaluation in LAVIS 1.0.2 makes of an answer, in percent, and of what people said.
RECORDED = [
    ("Two dogs.", ["2 dogs"] * 4 + ["dogs"] * 6, 100),
    ("No!", ["no"] * 2 + ["yes"] * 8, 60),
    ("1,000", ["1000"] * 3 + ["1,000"] * 7, 100),
    ("1,000 km/h", ["1000 kmh"] * 9 + ["x"], 100),
    ("dont know", ["don't know"] * 10, 100),
    ("somebody'd", ["somebodyd"] * 10, 100),
    ("The Man's hat", ["man's hat"] + ["hat"] * 9, 30),
    ("t-shirt", ["t shirt"] * 2 + ["t-shirt"] * 2 + ["shirt"] * 6, 100),
    ("t- shirt", ["t shirt"] * 10, 100),
    ("none", ["0"] * 9 + ["none"], 100),
    ("3. 5", ["3 5"] * 10, 100),
    ("u.s.a.", ["usa"] * 6 + ["u.s.a."] * 4, 100),
    ("black/white", ["black and white"] * 5 + ["black white"] * 5, 100),
    ("Black / White", ["black  white"] * 10, 0),
    ("an apple", ["apple"] * 3 + ["an apple"] * 7, 90),
    ("five", ["five"] * 10, 0),  # what people said keeps its number words
    ("five", ["five"] * 9 + ["5"], 30),
    (".5", [".5"] * 10, 100),
    ("a", ["a"] * 10, 0),
    ("", [""] * 10, 100),
    ("yes", ["Yes"] * 9 + ["no"], 0),
    ("youre\tright", ["you're right"] * 10, 100),
    ("." * 40, ["." * 8] * 10, 100),  # no more than 32 periods go
]


@pytest.mark.parametrize("answer, given, percent", RECORDED)
def test_vqa_accuracy_is_that_of_the_official_evaluation(answer, given, percent):
    assert 100 * vqa_score.accuracy(answer, given) == pytest.approx(percent)


@pytest.mark.skipif(
    not LAVIS_EVALUATION.exists(), reason="no .venv-lavis; make test-lavis makes it"
)
@pytest.mark.filterwarnings("ignore")
def test_vqa_accuracy_is_lavis_own_on_any_answers(capsys):
    spec = importlib.util.spec_from_file_location("vqa_eval", LAVIS_EVALUATION)
    evaluation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluation)

    class Questions:
        def __init__(self, content: dict) -> None:
            self.qa = content

        def getQuesIds(self) -> list[int]:
            return list(self.qa)

    rng = random.Random(0)
    pieces = (
        "a the two none dont it'd itdve shed've 1,000 2.5 . ? ! - / t-shirt red Yes x,y , i & é"
    )
    pieces = [*re.split(" ", pieces), " ", "  ", "\n", "." * 20, "'twas", "twas", "ow's'at"]

    def text() -> str:
        return rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(0, 4)))

    answers = {key: text() for key in range(3000)}
    given = {}
    for key, answer in answers.items():
        choices = [vqa_score.normalised(answer), answer, text(), text()]
        weights = rng.choice([(1, 1, 1, 1), (9, 1, 1, 0), (1, 0, 0, 0)])
        given[key] = rng.choices(choices, weights, k=10)
    notes = {
        key: {
            "answers": [{"answer": t, "answer_id": n} for n, t in enumerate(texts)],
            "question_type": key,
            "answer_type": "other",
        }
        for key, texts in given.items()
    }
    results = {key: {"answer": answer} for key, answer in answers.items()}
    judged = evaluation.VQAEval(Questions(notes), Questions(results), n=9)
    judged.evaluate()
    capsys.readouterr()
    ours = {key: 100 * vqa_score.accuracy(answers[key], given[key]) for key in answers}
    assert judged.evalQA == pytest.approx(ours)


@pytest.mark.parametrize(
    "data_set, change, match",
    [
        ("coco", {"coco_karpathy_test_gt.json": None}, "has none of dataset_coco.json, coco_kar"),
        ("coco", {"coco_karpathy_test_gt.json": "{"}, "is damaged, or of another data set"),
        ("coco", {"coco_karpathy_test_gt.json": "[]"}, "it holds no JSON object"),
        ("coco", {"coco_karpathy_test_gt.json": '{"a": 1}'}, "no 'images' in it"),
        ("coco", {"val2014/COCO_val2014_000000391902.jpg": None}, "1 of 6 pictures are not there"),
        ("vqav2", {data_sets.QUESTIONS: None}, "is not there; put the data set's file there"),
        ("vqav2", {data_sets.QUESTIONS: '{"questions": [{}]}'}, "no 'image_id' in it"),
        (
            "vqav2",
            {data_sets.ANSWERS: '{"annotations": []}'},
            "has no answers to .* of the questions",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_said_before_any_work(
    score, data_dir, tmp_path, data_set, change, match
):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    for name, content in change.items():
        (copy / name).unlink() if content is None else (copy / name).write_text(content)
    with pytest.raises(Blip2Error, match=match):
        score(data_set, data_dir=copy)
    assert not list(tmp_path.glob("*.jsonl"))

"""COCO captions (Karpathy's test split) and VQAv2 (validation), read from the data sets' own files.

    data = OPENERS["coco"](Path("coco"))
    data.items[0].picture, data.items[0].prompt, data.score({391895: "a man riding a motorcycle"})

How the model is asked is how LAVIS asks it for the published scores: its configurations
caption_coco_opt2.7b_eval and vqav2_zeroshot_opt_eval.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench import caption_score, vqa_score
from blip2.errors import Blip2Error

PICTURES = "val2014"  # both data sets are about pictures of COCO's validation set of 2014
CAPTIONS = ("dataset_coco.json", "coco_karpathy_test_gt.json")  # the first that is there
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS = "v2_mscoco_val2014_annotations.json"
_MAX_WORDS = 50  # of a question
_NO_PART = re.compile(r'[.!"()*#:;~]')  # of a question, as LAVIS asks it


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to ask: about which picture, what OPT reads, and the id that the data set gives it."""

    key: int
    picture: Path
    prompt: str


class DataSet:
    """What is asked, how, and how answers are scored.

    Attributes:
        items: everything there is to ask, those about one picture together.
        sources: the files that were read.
        decoding: how LAVIS decodes it: arguments of `blip2.Model.ask`.
        model: the checkpoint that the published scores are of.
        image_size: that checkpoint's, in pixels.
        published: scores by name, and who published them.
        columns: names of the scores, in order.
    """

    name: ClassVar[str]
    model: ClassVar[str]
    image_size: ClassVar[int]
    decoding: ClassVar[dict[str, Any]]
    published: ClassVar[dict[str, dict[str, float]]]
    columns: ClassVar[tuple[str, ...]]
    items: list[Item]
    sources: list[Path]

    def score(self, answers: Mapping[int, str]) -> dict[str, float]:
        """Scores of answers by item's key, by name, in percent."""
        raise NotImplementedError

    def result(self, key: int, answer: str) -> dict[str, Any]:
        """An answer in the form that the data set's own servers and tools read."""
        raise NotImplementedError


class CocoCaptions(DataSet):
    """COCO captions, Karpathy's test split: 5000 pictures, each with five captions at least."""

    name = "COCO captions, Karpathy test"
    model, image_size = "Salesforce/blip2-opt-2.7b-coco", 364
    # Min and max are new tokens behind the prompt.
    decoding: ClassVar = {"num_beams": 5, "min_output_len": 8, "max_output_len": 30}
    published: ClassVar = {
        "published (BLIP-2's paper)": {"BLEU-4": 43.7, "CIDEr": 145.8},
        "LAVIS, by its configuration": {
            **dict(zip(caption_score.BLEU, (83.2, 69.1, 55.6, 43.8), strict=True)),
            "ROUGE-L": 62.0,
            "CIDEr": 146.1,
        },
    }
    columns = caption_score.NAMES

    def __init__(self, directory: Path) -> None:
        """Read Karpathy's own file, or the references that LAVIS distributes.

        Raises:
            Blip2Error: neither is there, or one is damaged.
        """
        path = next((path for name in CAPTIONS if (path := directory / name).is_file()), None)
        if path is None:
            raise Blip2Error(
                f"{directory} has none of {', '.join(CAPTIONS)}", "put one of them there"
            )
        content, self.sources = _read(path), [path]
        self._references: dict[int, list[str]] = collections.defaultdict(list)
        files: dict[int, str] = {}
        try:
            if "annotations" in content:
                for note in content["annotations"]:
                    self._references[int(note["image_id"])].append(str(note["caption"]))
                files = {key: _file_name(key) for key in self._references}
            else:
                for picture in content["images"]:
                    if picture["split"] == "test":
                        key = int(picture["cocoid"])
                        files[key] = f"{picture['filepath']}/{picture['filename']}"
                        self._references[key] = [str(s["raw"]) for s in picture["sentences"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None
        self.items = [Item(key, directory / file, "a photo of") for key, file in files.items()]

    def score(self, answers: Mapping[int, str]) -> dict[str, float]:
        """BLEU, ROUGE and CIDEr of captions by picture's id."""
        return caption_score.scores(answers, {key: self._references[key] for key in answers})

    def result(self, key: int, answer: str) -> dict[str, Any]:
        """A line of COCO's format of results."""
        return {"image_id": key, "caption": answer}


class VQAv2(DataSet):
    """VQAv2, validation: 214354 questions about 40504 pictures, each answered by ten people."""

    name = "VQAv2, validation, zero-shot"
    model, image_size = "Salesforce/blip2-opt-2.7b", 224
    decoding: ClassVar = {
        "num_beams": 5,
        "min_output_len": 1,
        "max_output_len": 10,
        "length_penalty": 0.0,
    }
    published: ClassVar = {"LAVIS, by its configuration": {"accuracy": 51.88}}
    columns = ("accuracy", "yes/no", "number", "other")

    def __init__(self, directory: Path) -> None:
        """Read questions and annotations.

        Raises:
            Blip2Error: one is not there, or damaged, or of other questions.
        """
        questions, answers = self.sources = [directory / QUESTIONS, directory / ANSWERS]
        try:
            notes = {int(note["question_id"]): note for note in _read(answers)["annotations"]}
            self._given = {
                key: [str(answer["answer"]) for answer in note["answers"]]
                for key, note in notes.items()
            }
            self._types = {key: str(note["answer_type"]) for key, note in notes.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(answers, error) from None
        try:
            asked = sorted(_read(questions)["questions"], key=lambda one: one["image_id"])
            self.items = [
                Item(
                    int(one["question_id"]),
                    directory / _file_name(int(one["image_id"])),
                    f"Question: {as_lavis_asks(one['question'])} Short answer:",
                )
                for one in asked
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(questions, error) from None
        if missing := {item.key for item in self.items} - self._given.keys():
            raise Blip2Error(
                f"{answers} has no answers to {len(missing)} of the questions in {questions},"
                f" {min(missing)} among them",
                "take both files of one release",
            )

    def score(self, answers: Mapping[int, str]) -> dict[str, float]:
        """VQA's accuracy of answers by question's id, over all and by the kind of answer."""
        found: dict[str, list[float]] = collections.defaultdict(list)
        for key, answer in answers.items():
            right = vqa_score.accuracy(answer, self._given[key])
            for kind in ("accuracy", self._types[key]):
                found[kind].append(100 * right)
        return {kind: statistics.fmean(values) for kind, values in found.items()}

    def result(self, key: int, answer: str) -> dict[str, Any]:
        """A line of VQA's format of results."""
        return {"question_id": key, "answer": answer}


OPENERS: dict[str, type[DataSet]] = {"coco": CocoCaptions, "vqav2": VQAv2}


def as_lavis_asks(question: str) -> str:
    """A question in small letters, without some of its marks, and its first 50 words at most."""
    words = _NO_PART.sub("", question.lower()).rstrip(" ").split(" ")
    return " ".join(words[:_MAX_WORDS])


def check_pictures(items: Sequence[Item]) -> None:
    """See that every picture is there, before any work.

    Raises:
        Blip2Error: names the first that is not, and says how many are not.
    """
    pictures = dict.fromkeys(item.picture for item in items)
    missing = [picture for picture in pictures if not picture.is_file()]
    if missing:
        raise Blip2Error(
            f"{len(missing)} of {len(pictures)} pictures are not there, {missing[0]} among them",
            f"unpack COCO's {PICTURES}.zip beside the annotations",
        )


def _file_name(image_id: int) -> str:
    """Where COCO keeps a picture of its validation set of 2014."""
    return f"{PICTURES}/COCO_{PICTURES}_{image_id:012}.jpg"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Blip2Error(f"{path} is not there", "put the data set's file there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    return content


def _damaged(path: Path, error: object) -> Blip2Error:
    what = f"no {error} in it" if isinstance(error, KeyError) else error
    return Blip2Error(f"{path} is damaged, or of another data set ({what})", "download it again")

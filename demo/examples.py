"""Scenes as a model reads them: the tokenizer, and pictures and texts as arrays of integers.

Imports no torch, so that the processes that render start at once.
"""

import random
import signal
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo.drawing import Scene, draw
from demo.scenes import (
    FORMS,
    Example,
    Question,
    caption,
    completion,
    evaluation_set,
    listing_from_top,
    prompt,
    questions,
)

IMAGE_SIZE = 96
TEXT_LENGTH = 28  # tokens from BOS to newline; the longest listing takes all of them
BOS, PAD = 2, 1
IGNORED = -100  # a target that does not count
TOKENIZER_SEEDS = 800
HEIGHTS = ("is_above", "what_above")
SIDES = ("is_beside", "what_beside")
OTHERS = tuple(form for form in FORMS if form not in HEIGHTS + SIDES)
# The questions about a picture, beside its caption and its listing from top to bottom. Where an
# object is takes longest to learn, and its height longest of all: captions go from left to right.
MIXTURE = {"above": (HEIGHTS, 3), "beside": (SIDES, 1), "others": (OTHERS, 2)}
KINDS = ("captions", "listings", *(kind for kind, (_, n) in MIXTURE.items() for _ in range(n)))
IMAGE_TOKEN = "<image>"


class Batch(NamedTuple):
    """`pixels` B x S x S x 3 uint8; `ids` and `targets` B x len(KINDS) x TEXT_LENGTH int16.

    `targets` holds the ids the model is to write, at their own place in `ids`, else IGNORED.
    """

    pixels: np.ndarray
    ids: np.ndarray
    targets: np.ndarray


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer as OPT's: every text starts with '</s>', any byte encodes.

    Special tokens: <s> 0, <pad> 1, </s> 2, <unk> 3, and <image> as the last id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # never reached: it ends when every word of the scenes is one token
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (
        prompt(example.question) + completion(example.question, example.answer)
        for example in evaluation_set(0, TOKENIZER_SEEDS, FORMS)
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", BOS)]
    )
    return tokenizer


def pixels(image: Image.Image) -> np.ndarray:
    """S x S x 3 uint8, resized as Hugging Face's BlipImageProcessor does it with Pillow."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def encode(tokenizer: Tokenizer, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """One row of `ids` and one of `targets`: only the answer and its newline are targets."""
    asked = tokenizer.encode(prompt(question)).ids
    wanted = tokenizer.encode(completion(question, answer), add_special_tokens=False).ids
    ids = np.full(TEXT_LENGTH, PAD, np.int16)
    targets = np.full(TEXT_LENGTH, IGNORED, np.int16)
    end = len(asked) + len(wanted)
    ids[:end] = asked + wanted
    targets[len(asked) : end] = wanted
    return ids, targets


def training_batch(tokenizer: Tokenizer, seeds: range) -> Batch:
    """The pictures of `seeds`, each with one text of each of KINDS."""
    images, rows = [], []
    for seed in seeds:
        scene = draw(seed)
        rng = random.Random(f"questions {seed}")
        asked = [listing_from_top(scene)]
        for forms, count in MIXTURE.values():
            asked += _ask(scene, rng, forms, count)
        images.append(pixels(scene.image))
        rows.append(encode(tokenizer, "", caption(scene)))
        rows += [encode(tokenizer, question.text, question.answer) for question in asked]
    shape = (len(seeds), len(KINDS), TEXT_LENGTH)
    ids, targets = (np.stack(part).reshape(shape) for part in zip(*rows, strict=True))
    return Batch(np.stack(images), ids, targets)


def _ask(scene: Scene, rng: random.Random, forms: tuple[str, ...], count: int) -> list[Question]:
    """`count` questions of `forms`, again of the same ones where the scene allows few."""
    asked: list[Question] = []
    while len(asked) < count:
        asked += questions(scene, rng, forms) or questions(scene, rng, OTHERS)
    rng.shuffle(asked)
    return asked[:count]


class EvaluationBatch(NamedTuple):
    """Pictures once each; `owner` says for every text which of them it is about."""

    pixels: np.ndarray
    owner: np.ndarray
    ids: np.ndarray
    targets: np.ndarray
    forms: list[str]


def evaluation_batch(tokenizer: Tokenizer, seeds: range) -> EvaluationBatch:
    """Everything of every form that can be asked about the pictures of `seeds`."""
    examples: list[Example] = list(evaluation_set(seeds.start, len(seeds), FORMS))
    rows = [encode(tokenizer, example.question, example.answer) for example in examples]
    ids, targets = (np.stack(part) for part in zip(*rows, strict=True))
    return EvaluationBatch(
        np.stack([pixels(example.image) for example in examples if example.form == "caption"]),
        np.array([example.seed - seeds.start for example in examples]),
        ids,
        targets,
        [example.form for example in examples],
    )


_worker_tokenizer: Tokenizer  # one a process, set when the process starts


def start_worker(tokenizer_json: str) -> None:
    """Give this rendering process its tokenizer."""
    global _worker_tokenizer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a pool ends its processes: no traceback
    _worker_tokenizer = Tokenizer.from_str(tokenizer_json)


def worker_training_batch(seeds: range) -> Batch:
    """`training_batch` with the tokenizer of this process."""
    return training_batch(_worker_tokenizer, seeds)


def worker_evaluation_batch(seeds: range) -> EvaluationBatch:
    """`evaluation_batch` with the tokenizer of this process."""
    return evaluation_batch(_worker_tokenizer, seeds)

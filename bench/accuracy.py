"""Captions of COCO and answers to VQAv2, scored beside the published scores: docs/published.md.

    python -m bench.accuracy coco --data_dir coco           # Salesforce/blip2-opt-2.7b-coco
    python -m bench.accuracy vqav2 --data_dir coco --precision int8 int4
    python -m bench.accuracy coco --data_dir coco --engine_dir out --opt_engine_dir out/opt

Answers are kept in --output_dir, a line each; a run that was ended goes on with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2 import cli
from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from bench.data_sets import DataSet, Item
    from blip2.api import Model
    from blip2.engines import Places
    from blip2.prompts import Tokenizer

PRECISIONS = ("float16", "int8", "int4")
AS_CONVERTED = "as converted"
MAX_TXT_LEN = 32  # tokens of a prompt; LAVIS cuts what is longer
WINDOW = 256  # answers that are written to disk at once


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Score BLIP-2 on COCO captions or VQAv2, per precision.")
    add = parser.add_argument
    add("data_set", choices=("coco", "vqav2"), help="what to score")
    add("--data_dir", type=Path, required=True, help="the data set's files, and val2014/")
    add("--engine_dir", help="ViT and Q-Former, or a checkpoint (default: that of the scores)")
    add("--opt_engine_dir", help="a converted OPT (default: the checkpoint's)")
    add("--precision", nargs="+", choices=PRECISIONS, help="of a checkpoint's OPT (default: all)")
    add("--output_dir", type=Path, default=Path("accuracy"), help="answers and scores")
    add("--pictures", type=cli.positive_int, help="only the first so many (default: all)")
    args = parser.parse_args()
    if args.opt_engine_dir and args.precision:
        parser.error("--precision is for a checkpoint's OPT, not for a converted one")
    return args


def main() -> None:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help does not wait for torch.
    import pycocoevalcap  # noqa: F401 - before hours of work

    from bench.data_sets import OPENERS, check_pictures
    from blip2.engines import Places

    data = OPENERS[args.data_set](args.data_dir)
    items = first_pictures(data.items, args.pictures)
    check_pictures(items)
    model = args.engine_dir or data.model
    places = Places.of(model, args.opt_engine_dir or model)
    named = [AS_CONVERTED] if args.opt_engine_dir else args.precision or PRECISIONS
    rows = {}
    for name in named:
        stem = args.output_dir / f"{args.data_set}-{name.replace(' ', '_')}"
        precision = None if name == AS_CONVERTED else name
        try:
            answers, image_size = answer(data, items, places, precision, Path(f"{stem}.jsonl"))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where this one stopped") from None
        results = [data.result(key, text) for key, text in answers.items()]
        Path(f"{stem}.json").write_text(json.dumps(results) + "\n")
        rows[name] = data.score(answers)
    text = table(data, rows, len(items), image_size)
    (args.output_dir / f"{args.data_set}.md").write_text(text + "\n")
    print(text)


def first_pictures(items: Sequence[Item], count: int | None) -> list[Item]:
    """The items about the first pictures."""
    groups = itertools.groupby(items, key=lambda item: item.picture)
    return [item for _, group in itertools.islice(groups, count) for item in group]


def answer(
    data: DataSet, items: Sequence[Item], places: Places, precision: str | None, path: Path
) -> tuple[dict[int, str], int]:
    """The answers by item's key, those that an earlier run left in `path` among them; and the ViT's
    side in pixels.

    Raises:
        Blip2Error: the engines cannot be opened, a picture cannot be read, or `path` holds others.
    """
    from blip2.api import Model
    from blip2.many.journal import Journal
    from blip2.pipeline import open_pipeline

    pipeline = open_pipeline(places, precision=precision)
    made_of = made_with(data, items, places, precision)
    with Model(pipeline) as model, Journal(path, 1, made_of) as journal:
        remaining = itertools.islice(items, journal.done, None)
        progress(path, journal.done, len(items), 0.0)
        begun, done = time.perf_counter(), 0
        while window := list(itertools.islice(remaining, WINDOW)):
            journal.append(list(lines(data, window, model, pipeline.tokenizer)))
            done += len(window)
            rate = done / (time.perf_counter() - begun)
            progress(path, journal.done + done, len(items), rate)
    return kept(path, items), pipeline.vision.preprocessing.height


def made_with(
    data: DataSet, items: Sequence[Item], places: Places, precision: str | None
) -> dict[str, Any]:
    """What must be the same for a run to go on with another's answers, by flag."""
    asked = hashlib.sha256()
    for item in items:
        asked.update(f"{item.key} {item.picture} {item.prompt}\n".encode())
    parts = {f"--{name}": value for name, value in places.fingerprints().items()}
    return {
        "--data_dir or --pictures": asked.hexdigest(),
        "--precision": precision,
        "decoding": data.decoding,
        **parts,
    }


def lines(
    data: DataSet, window: Sequence[Item], model: Model, tokenizer: Tokenizer
) -> Iterator[dict[str, str]]:
    """A line for each item, of what the model answers; a picture is looked at once a window."""
    pictures = {item.picture: str(item.picture) for item in window}
    answers = model.ask(
        [pictures[item.picture] for item in window],
        [cut(item.prompt, tokenizer) for item in window],
        prompt_template="{}",
        num_return_sequences=1,
        **data.decoding,
    )
    for item, found in zip(window, answers, strict=True):
        yield {"path": item.picture.name, "key": str(item.key), "answer": found.text}


def cut(prompt: str, tokenizer: Tokenizer) -> str:
    """A prompt's first MAX_TXT_LEN tokens, its begin among them, as text."""
    ids = tokenizer.encode(prompt)
    return prompt if len(ids) <= MAX_TXT_LEN else tokenizer.decode(ids[1:MAX_TXT_LEN])


def kept(path: Path, items: Sequence[Item]) -> dict[int, str]:
    """The answers in a journal, which are those to `items`, in order."""
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    if [line["key"] for line in found] != [str(item.key) for item in items]:
        raise Blip2Error(f"{path} holds other answers", "remove it, or choose another --output_dir")
    return {int(line["key"]): line["answer"] for line in found}


def progress(path: Path, done: int, total: int, rate: float) -> None:
    rest = f", {rate:.1f}/s, {(total - done) / rate / 60:.0f} minutes to go" if rate else ""
    print(f"{path.stem}: {done} of {total} answers{rest}", file=sys.stderr, flush=True)


def table(data: DataSet, rows: dict[str, dict[str, float]], count: int, image_size: int) -> str:
    """Markdown: a row for each precision, and those that were published."""
    from bench.caption_score import has_java

    lines = [f"{data.name}: {count} answers, pictures of {image_size} x {image_size}", ""]
    lines += [f"| OPT as | {' | '.join(data.columns)} |", "|---" * (len(data.columns) + 1) + "|"]
    for name, scores in {**rows, **data.published}.items():
        cells = (f"{scores[column]:.2f}" if column in scores else "" for column in data.columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = []
    if count < len(data.items):
        notes.append(f"only {count} of {len(data.items)} were asked: not the published scores' set")
    if image_size != data.image_size:
        notes.append(f"the published scores are of pictures of {data.image_size} pixels")
    if data.columns[-1] == "CIDEr" and not has_java():
        notes.append(
            "without Java words were split by bench.caption_score, not by COCO's tokenizer"
        )
    return "\n".join([*lines, *(f"\nNote: {note}." for note in notes)])


if __name__ == "__main__":
    cli.run(main)

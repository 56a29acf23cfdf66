"""This suite's answers about the pictures, from engines as run.py opens them.

python -m bench.published.answers EXPORT/onnx OPT PICTURES OUT.json --features FEATURES.pt
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.published import pictures
from bench.published.asking import DECODINGS, MAX_OUTPUT_LEN, Timed, digest
from bench.published.pictures import Item
from blip2 import cli, images
from blip2.engines import Places
from blip2.pipeline import Look, Pipeline, Stopwatch, open_pipeline


def main() -> None:
    parser = cli.ArgumentParser("Answer questions about pictures.")
    parser.add_argument("engine_dir")
    parser.add_argument("opt_engine_dir")
    parser.add_argument("pictures", type=Path, help="directory with items.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", type=Path, help="what transformers' ViT and Q-Former see")
    args = parser.parse_args()
    begun = time.perf_counter()
    pipeline = open_pipeline(Places.of(args.engine_dir, args.opt_engine_dir))
    loaded = time.perf_counter() - begun
    items = pictures.read(args.pictures)
    suite = Suite(pipeline)
    features = torch.load(args.features, weights_only=True) if args.features else {}
    # The first answer, and the first of several beams, compile what they need.
    if pipeline.vision.device.type == "cuda":
        for decoding in DECODINGS:
            suite.answer(items[0], decoding)
        suite.seconds.clear()
    errors = {
        file: [relative(found, right) for found, right in zip(suite.look(file), seen, strict=True)]
        for file, seen in features.items()
    }
    suite.seconds.clear()
    answers = [suite.answer(item, decoding) for item in items for decoding in DECODINGS]
    content = {
        "device": str(pipeline.vision.device),
        "load_seconds": loaded,
        "answers": answers,
        "seconds": suite.seconds,
        "pixels": suite.pixels(items),
        "prompts": {item.prompt: pipeline.tokenizer.encode(item.prompt) for item in items},
        "errors": errors,
    }
    args.out.write_text(json.dumps(content) + "\n")


class Suite:
    """The open engines, and the seconds of each stage, a value for each answer."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.seconds: dict[str, list[float]] = {}

    def look(self, file: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the ViT and the Q-Former make of a picture: T x H_v and n x H_lm."""
        seen = self._look(file)
        return seen.image_embeds[0], seen.query_output[0]

    def answer(self, item: Item, decoding: str) -> dict[str, Any]:
        """The answer to a question, as `reference` has it."""
        pipeline = self._pipeline
        options = pipeline.options({"max_output_len": MAX_OUTPUT_LEN, **DECODINGS[decoding]})
        with self._timed(f"picture to answer, {decoding}"):
            pipeline.prepare([item.prompt], options)
            look = self._look(item.file)
            with self._timed(f"OPT, {decoding}"):
                [found] = pipeline.language.generate(
                    pipeline.encode([item.prompt]), look.query_output, options
                )
        pipeline.check_look(look)
        best = found.beams[0]
        return {
            **dataclasses.asdict(item),
            "decoding": decoding,
            "ids": best.token_ids,
            "text": pipeline.tokenizer.decode(best.token_ids),
            "log_prob": best.log_prob,
        }

    def pixels(self, items: list[Item]) -> dict[str, str]:
        """By picture, the SHA-256 of its pixel_values in float32."""
        preprocessing = self._pipeline.vision.preprocessing
        return {
            file: digest(images.pixel_values(images.load_image(file), preprocessing))
            for file in dict.fromkeys(item.file for item in items)
        }

    def _look(self, file: str) -> Look:
        pixels = images.resized_pixels(images.load_image(file), self._pipeline.vision.preprocessing)
        watch = Stopwatch()
        look = self._pipeline.look(torch.from_numpy(pixels)[None], watch)
        for stage, seconds in watch.seconds.items():
            self.seconds.setdefault(stage, []).append(seconds)
        return look

    def _timed(self, stage: str) -> Timed:
        return Timed(self.seconds.setdefault(stage, []))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference over that of what is right."""
    found, right = found.float().cpu(), right.float()
    return ((found - right).norm() / right.norm()).item()


if __name__ == "__main__":
    cli.run(main)

"""What --decode fast saves of large JPEGs, and what it changes.

    python -m bench.decoding --engine_dir demo/checkpoint --pictures 100

Scenes of the demo, drawn large (12 megapixels, as a phone's), saved as JPEGs of quality 90 and decoded
both ways on one processor: milliseconds a picture, the difference of the bytes that the ViT reads, and
how many captions and answers stay the same.
"""

from __future__ import annotations

import dataclasses
import io
import time

import numpy as np
from PIL import Image

import blip2
from blip2 import cli
from blip2.images import Preprocessing, decode_image, resized_pixels
from demo import scenes

WIDTH, HEIGHT = 4032, 3024
QUESTION = "How many objects are there?"


def large_jpeg(number: int) -> bytes:
    """A scene that nobody trained on, as a photo of 12 megapixels: with a sensor's noise."""
    image = scenes.draw(scenes.EVALUATION_SEED + number).image.resize((WIDTH, HEIGHT))
    noise = np.random.default_rng(number).normal(0, 4, (HEIGHT, WIDTH, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=90)
    return content.getvalue()


def main() -> None:
    parser = cli.ArgumentParser("Measure what --decode fast saves, and what it changes.")
    parser.add_argument("--engine_dir", default="demo/checkpoint")
    parser.add_argument("--pictures", type=cli.positive_int, default=100)
    args = parser.parse_args()
    model = blip2.load(args.engine_dir)
    preprocessing = model._pipeline.vision.preprocessing
    same = {"captions": 0, "answers": 0}
    measured = {side: Measured() for side in (preprocessing.width, 224)}
    for number in range(args.pictures):
        content = large_jpeg(number)
        for side, found in measured.items():
            found.decode(content, dataclasses.replace(preprocessing, width=side, height=side))
        images = [decode_image(content, "it", way) for way in (None, 2 * preprocessing.width)]
        for what, question in (("captions", ""), ("answers", QUESTION)):
            exact, fast = model.ask(images, question)
            same[what] += exact.text == fast.text
    for side, found in measured.items():
        print(f"{args.pictures} JPEGs of {WIDTH} x {HEIGHT} for a ViT of {side}: {found}")
    for what, count in same.items():
        print(f"{count} of {args.pictures} {what} are the same")


class Measured:
    """Both ways of decoding, for one size of ViT."""

    def __init__(self) -> None:
        self._seconds = {"exact": 0.0, "fast": 0.0}
        self._means: list[float] = []
        self._largest = 0

    def decode(self, content: bytes, preprocessing: Preprocessing) -> None:
        pixels = {}
        for way in self._seconds:
            begun = time.perf_counter()
            image = decode_image(content, "it", 2 * preprocessing.width if way == "fast" else None)
            pixels[way] = resized_pixels(image, preprocessing).astype(int)
            self._seconds[way] += time.perf_counter() - begun
        difference = np.abs(pixels["fast"] - pixels["exact"])
        self._means.append(difference.mean())
        self._largest = max(self._largest, difference.max())

    def __str__(self) -> str:
        exact, fast = (1e3 * total / len(self._means) for total in self._seconds.values())
        return (
            f"exact {exact:.1f} ms each, fast {fast:.1f}; bytes differ by {np.mean(self._means):.2f} on"
            f" average, at most by {self._largest}"
        )


if __name__ == "__main__":
    cli.run(main)

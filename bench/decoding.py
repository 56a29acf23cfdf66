"""What --decode fast saves of large JPEGs, and what it changes.

    python -m bench.decoding --engine_dir demo/checkpoint --pictures 100

Scenes of the demo, drawn large (12 megapixels, as a phone's), saved as JPEGs of quality 90 and decoded
both ways on one processor: milliseconds a picture, the difference of the bytes that the ViT reads, and
how many captions and answers stay the same.
"""

from __future__ import annotations

import argparse
import io
import time

import numpy as np
from PIL import Image

import blip2
from blip2.images import decode_image, resized_pixels
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", default="demo/checkpoint")
    parser.add_argument("--pictures", type=int, default=100)
    args = parser.parse_args()
    model = blip2.load(args.engine_dir)
    preprocessing = model._pipeline.vision.preprocessing
    sides = {"exact": None, "fast": 2 * max(preprocessing.width, preprocessing.height)}
    seconds = dict.fromkeys(sides, 0.0)
    means, largest, same = [], [], {"captions": 0, "answers": 0}
    for number in range(args.pictures):
        content, pixels, images = large_jpeg(number), {}, {}
        for way, least_side in sides.items():
            begun = time.perf_counter()
            images[way] = decode_image(content, "a scene", least_side)
            pixels[way] = resized_pixels(images[way], preprocessing)
            seconds[way] += time.perf_counter() - begun
        difference = np.abs(pixels["fast"].astype(int) - pixels["exact"])
        means.append(difference.mean())
        largest.append(difference.max())
        both = [images["exact"], images["fast"]]
        for what, question in (("captions", ""), ("answers", QUESTION)):
            exact, fast = model.ask(both, question)
            same[what] += exact.text == fast.text
    print(f"{args.pictures} JPEGs of {WIDTH} x {HEIGHT}, ViT of {preprocessing.width}")
    for way, total in seconds.items():
        print(f"{way:<6} {total / args.pictures * 1e3:.1f} ms a picture")
    print(f"bytes differ by {np.mean(means):.2f} on average, at most by {max(largest)} (of 255)")
    for what, count in same.items():
        print(f"{count} of {args.pictures} {what} are the same")


if __name__ == "__main__":
    main()

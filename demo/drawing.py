"""Draws pictures of coloured shapes: everything follows from a seed and Python's `random` alone.

The same seed is the same picture on every machine. scenes.py puts the pictures into words.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from blip2.errors import Blip2Error

CANVAS = 224
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (212, 36, 36),
    "orange": (244, 132, 20),
    "yellow": (244, 224, 48),
    "green": (36, 158, 60),
    "blue": (44, 76, 220),
    "purple": (150, 46, 178),
}
SIZES = {"small": (20.0, 24.0), "large": (34.0, 40.0)}  # radius of the enclosing circle, pixels
ATTRIBUTES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}
BACKGROUNDS = ("plain", "noisy", "striped", "checkered", "gradient")
SEPARATION = 20.0  # pixels between two centres along an axis before one is left of (above) another
GAP = 4.0  # pixels between two enclosing circles, and from each to the edge
MAX_OBJECTS = 4

_SUPERSAMPLING = 4
_TILT = {"circle": 0.0, "square": 8.0, "triangle": 8.0, "star": 15.0, "cross": 10.0}  # degrees


@dataclass(frozen=True)
class Thing:
    """One object of a scene: what it is called, and its enclosing circle in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A drawn picture (RGB, CANVAS x CANVAS), its objects from left to right, its background."""

    image: Image.Image
    objects: tuple[Thing, ...]
    background: str


def draw(seed: int) -> Scene:
    """The scene of a seed: one to four objects that do not touch, on one of five backgrounds."""
    if seed < 0:
        raise Blip2Error(f"a scene's seed is {seed}", "give 0 or more")
    rng = random.Random(seed)
    count = rng.choices(range(1, MAX_OBJECTS + 1), weights=(3, 4, 5, 5))[0]
    kinds: list[dict[str, str]] = []
    for _ in range(count):
        kind = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
        if kinds and rng.random() < 0.35:  # else two objects would seldom share an attribute
            shared = rng.choice(list(ATTRIBUTES))
            kind[shared] = rng.choice(kinds)[shared]
        kinds.append(kind)
    radii = [rng.uniform(*SIZES[kind["size"]]) for kind in kinds]
    centres = _place(rng, radii)
    things = [
        Thing(**kind, x=x, y=y, radius=radius)
        for kind, (x, y), radius in zip(kinds, centres, radii, strict=True)
    ]
    things.sort(key=lambda thing: thing.x)
    background = rng.choice(BACKGROUNDS)
    image = _background(rng, background)
    for thing in things:
        _paint(rng, image, thing)
    return Scene(image, tuple(things), background)


def _place(rng: random.Random, radii: list[float]) -> list[tuple[float, float]]:
    """Centres that keep the circles apart by GAP and the centres' x apart by SEPARATION."""
    while True:
        centres: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(30):
                x = rng.uniform(radius + GAP, CANVAS - radius - GAP)
                y = rng.uniform(radius + GAP, CANVAS - radius - GAP)
                if all(
                    abs(x - other_x) >= SEPARATION
                    and math.hypot(x - other_x, y - other_y) >= radius + other_radius + GAP
                    for (other_x, other_y), other_radius in zip(centres, radii, strict=False)
                ):
                    centres.append((x, y))
                    break
            else:
                break  # no room left: start the picture again
        if len(centres) == len(radii):
            return centres


def _background(rng: random.Random, kind: str) -> Image.Image:
    """A muted picture, so that every object colour stands out from it."""
    tone = rng.uniform(105, 190)
    tint = np.array([tone + rng.uniform(-14, 14) for _ in range(3)], np.float32)
    contrast = rng.uniform(16, 30)
    rows, columns = np.ogrid[:CANVAS, :CANVAS]
    if kind == "noisy":
        cells = CANVAS // 4  # coarse enough to survive a reduction to 96 pixels
        noise = np.frombuffer(rng.randbytes(cells * cells), np.uint8).reshape(cells, cells)
        pattern = (noise / 127.5 - 1).repeat(4, 0).repeat(4, 1) * 1.3
    elif kind == "striped":
        angle, period = rng.uniform(0, math.pi), rng.uniform(18, 30)
        phase = (math.cos(angle) * columns + math.sin(angle) * rows) / period + rng.random()
        pattern = np.where(phase % 1 < 0.5, 1.0, -1.0)
    elif kind == "checkered":
        cell, shift_x, shift_y = rng.uniform(14, 26), rng.uniform(0, 52), rng.uniform(0, 52)
        squares = (rows + shift_y) // cell + (columns + shift_x) // cell
        pattern = np.where(squares % 2 < 1, 1.0, -1.0)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        pattern = math.cos(angle) * (columns / CANVAS - 0.5)
        pattern = (pattern + math.sin(angle) * (rows / CANVAS - 0.5)) * 4
    else:
        pattern = np.zeros((CANVAS, CANVAS), np.float32)
    pixels = tint + (pattern * contrast).astype(np.float32)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paint(rng: random.Random, image: Image.Image, thing: Thing) -> None:
    """Paint one object onto `image`, in a shade near its colour, its edges smoothed."""
    colour = tuple(int(min(255, max(0, c + rng.uniform(-14, 14)))) for c in COLOURS[thing.colour])
    left, top = int(thing.x - thing.radius) - 1, int(thing.y - thing.radius) - 1
    side = 2 * int(thing.radius) + 4
    mask = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    outline = _outline(thing, math.radians(rng.uniform(-1, 1) * _TILT[thing.shape]))
    points = [((x - left) * _SUPERSAMPLING, (y - top) * _SUPERSAMPLING) for x, y in outline]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(colour, (left, top), mask.reduce(_SUPERSAMPLING))


def _outline(thing: Thing, tilt: float) -> list[tuple[float, float]]:
    """The corners of a shape inside its enclosing circle, turned by `tilt` radians."""
    quarter = math.pi / 2
    if thing.shape == "circle":  # a little smaller, so that shapes do not differ by area alone
        corners = [(math.tau * i / 48, 0.9) for i in range(48)]
    elif thing.shape == "square":
        corners = [(quarter * (i + 0.5), 1.0) for i in range(4)]
    elif thing.shape == "triangle":
        corners = [(math.tau * i / 3 - quarter, 1.0) for i in range(3)]
    elif thing.shape == "star":
        corners = [(math.pi * i / 5 - quarter, 0.42 if i % 2 else 1.0) for i in range(10)]
    else:  # a cross: two corners at the end of each arm, one between it and the next
        half = math.atan(0.32)
        corners = []
        for i in range(4):
            corners += [(quarter * i - half, 1.0), (quarter * i + half, 1.0)]
            corners += [(quarter * (i + 0.5), 0.32 * math.cos(half) * math.sqrt(2))]
    return [
        (
            thing.x + thing.radius * length * math.cos(angle + tilt),
            thing.y + thing.radius * length * math.sin(angle + tilt),
        )
        for angle, length in corners
    ]

"""What is asked: the guide's question about its picture, and a dozen about pictures of scikit-image.

Those lie in scikit-image's wheel, so that nothing more is downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

from blip2 import images

GUIDE_QUESTION = "Question: which city is this? Answer:"
GUIDE = "guide"
# A file of skimage/data, and a question about it.
ASKED = (
    ("astronaut.png", "what is the woman wearing?"),
    ("chelsea.png", "what animal is this?"),
    ("coffee.png", "what is in the cup?"),
    ("camera.png", "what is the man looking through?"),
    ("motorcycle_left.png", "where is the motorcycle?"),
    ("rocket.jpg", "what is about to be launched?"),
    ("horse.png", "what animal is this?"),
    ("coins.png", "what are these?"),
    ("moon.png", "what is this a photo of?"),
    ("hubble_deep_field.jpg", "what is this a photo of?"),
    ("brick.png", "what is the wall made of?"),
    ("page.png", "what is written on the page?"),
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question: `file` is a picture; an empty `prompt` asks for a caption."""

    file: str
    prompt: str

    @property
    def name(self) -> str:
        """For a table."""
        return f"{Path(self.file).stem}: {self.prompt or '(caption)'}"


def collect(image: str, count: int, directory: Path) -> list[Item]:
    """Save the pictures, and what is asked about them, in a directory that is made.

    Args:
        image: the guide's picture, a file or URL.
        count: pictures besides.
        directory: gets them, as PNG, and items.json.

    Raises:
        Blip2Error: the guide's picture cannot be read.
        ModuleNotFoundError: scikit-image is not installed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None:
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    data = Path(found.origin).parent / "data"
    sources = {f"{GUIDE}.png": image}
    sources |= {Path(name).with_suffix(".png").name: str(data / name) for name, _ in ASKED[:count]}
    directory.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        images.load_image(source).save(directory / name)
    prompts = [GUIDE_QUESTION, *(f"Question: {text} Answer:" for _, text in ASKED[:count])]
    items = [
        Item(str(directory / name), prompt)
        for name, asked in zip(sources, prompts, strict=True)
        for prompt in (asked, "")
    ]
    content = [dataclasses.asdict(item) for item in items]
    (directory / "items.json").write_text(json.dumps(content, indent=2) + "\n")
    return items


def read(directory: Path) -> list[Item]:
    """What `collect` has left."""
    return [Item(**fields) for fields in json.loads((directory / "items.json").read_text())]

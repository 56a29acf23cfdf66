"""Pictures of coloured shapes, with questions, answers and captions that are exact by construction.

    scene = draw(7)
    scene.image.save("scene.png")
    print(caption(scene))
    for question in questions(scene, random.Random(7)):
        print(question.text, question.answer)

README.md beside this file lists the vocabulary and the question forms; drawing.py draws.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from PIL import Image

from blip2.errors import Blip2Error
from demo.drawing import ATTRIBUTES, SEPARATION, Scene, Thing, draw

BESIDE = ("left of", "right of")
ABOVE = ("above", "below")
EVALUATION_SEED = 1_000_000_000  # training stays below it; pictures from here on are unseen


class Question(NamedTuple):
    """A question of one form, and its only right answer."""

    form: str
    text: str
    answer: str


class Example(NamedTuple):
    """One thing to be judged by: `question` is empty where a caption is wanted."""

    image: Image.Image
    question: str
    answer: str
    form: str
    seed: int


class Phrase(NamedTuple):
    """A description that may leave attributes open: (None, "red", None) is "red object"."""

    size: str | None
    colour: str | None
    shape: str | None

    def matches(self, thing: Thing) -> bool:
        """Whether `thing` has every attribute that this phrase names."""
        attributes = (thing.size, thing.colour, thing.shape)
        return all(want in (None, has) for want, has in zip(self, attributes, strict=True))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape or "object")))


def caption(scene: Scene) -> str:
    """The caption: every object from left to right, then the background."""
    listing = _listing(Phrase(o.size, o.colour, o.shape) for o in scene.objects)
    return f"{listing} on a {scene.background} background"


def listing_from_top(scene: Scene) -> Question:
    """Every object from top to bottom, to learn heights from, of which captions say nothing.

    For training alone: it is no fair question where two objects are almost equally high.
    """
    downwards = sorted(scene.objects, key=lambda thing: thing.y)
    answer = _listing(Phrase(None, o.colour, o.shape) for o in downwards)
    return Question("listing", "What objects are above and below?", answer)


def prompt(question: str) -> str:
    """What the language model reads before its answer; nothing where a caption is wanted."""
    return f"Question: {question} Answer:" if question else ""


def completion(question: str, answer: str) -> str:
    """What the language model is to write after the prompt: it ends with a newline."""
    return f" {answer}\n" if question else f"{answer}\n"


def questions(
    scene: Scene, rng: random.Random, forms: Collection[str] | None = None
) -> list[Question]:
    """At most one question of each of `forms` (all FORMS); what would be ambiguous is left out.

    Each starts with a capital or a small letter and says colour or color, as `rng` has it.
    """
    made = []
    for form in FORMS if forms is None else forms:
        if pair := FORMS[form](scene, rng):
            text, answer = pair
            if rng.random() < 0.5:
                text = text.replace("colour", "color")
            if rng.random() < 0.5:
                text = text[0].lower() + text[1:]
            made.append(Question(form, text, answer))
    return made


def evaluation_set(
    first_seed: int, count: int, forms: Collection[str] | None = None
) -> Iterator[Example]:
    """The captions of `count` scenes, and questions of `forms` (all FORMS) about them.

    From EVALUATION_SEED on they are unseen.
    """
    if count < 1:
        raise Blip2Error(f"an evaluation set of {count} scenes was asked for", "ask for 1 or more")
    for seed in range(first_seed, first_seed + count):
        scene = draw(seed)
        yield Example(scene.image, "", caption(scene), "caption", seed)
        rng = random.Random(f"questions {seed}")
        for question in questions(scene, rng, forms):
            yield Example(scene.image, question.text, question.answer, question.form, seed)


def _article(phrase: Phrase) -> str:
    return f"{'an' if str(phrase)[0] in 'aeiou' else 'a'} {phrase}"


def _listing(phrases: Iterable[Phrase]) -> str:
    """ "a red circle, a blue square and a green star"."""
    parts = [_article(phrase) for phrase in phrases]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _plural(phrase: Phrase) -> str:
    return f"{phrase}es" if str(phrase).endswith("s") else f"{phrase}s"


def _some_phrase(rng: random.Random, thing: Thing) -> Phrase:
    """A phrase that matches `thing`, with one to three attributes named."""
    named = rng.choice((1, 2, 3, 4, 5, 6, 6, 7))  # one bit each: size, colour, shape
    attributes = (thing.size, thing.colour, thing.shape)
    return Phrase(*(has if named >> bit & 1 else None for bit, has in enumerate(attributes)))


def _reference(
    scene: Scene, rng: random.Random, thing: Thing, without: str | None = None
) -> Phrase | None:
    """A phrase that only `thing` matches and that leaves the attribute `without` open."""
    kept = [None if f == without else getattr(thing, f) for f in Phrase._fields]
    options = {
        Phrase(*(has if named >> bit & 1 else None for bit, has in enumerate(kept)))
        for named in range(1, 8)
    }
    unique = [
        phrase
        for phrase in sorted(options, key=str)
        if any(phrase) and sum(phrase.matches(other) for other in scene.objects) == 1
    ]
    return rng.choice(unique) if unique else None


def _attribute(attribute: str, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    for thing in rng.sample(scene.objects, len(scene.objects)):
        if phrase := _reference(scene, rng, thing, without=attribute):
            return f"What {attribute} is the {phrase}?", getattr(thing, attribute)
    return None


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    phrase = _some_phrase(rng, rng.choice(scene.objects))
    draw_lots = rng.random()
    if draw_lots < 0.25:
        phrase = Phrase(None, None, None)
    elif draw_lots < 0.45:  # often none of these
        phrase = phrase._replace(colour=rng.choice(ATTRIBUTES["colour"]))
    number = sum(phrase.matches(thing) for thing in scene.objects)
    return f"How many {_plural(phrase)} are there?", str(number)


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    wanted = rng.random() < 0.5
    while True:
        phrase = _some_phrase(rng, rng.choice(scene.objects))
        if not wanted:  # change one attribute; half the time to one seen on another object
            field = rng.choice([f for f in Phrase._fields if getattr(phrase, f)])
            other = rng.choice(scene.objects)
            seen = rng.random() < 0.5
            value = getattr(other, field) if seen else rng.choice(ATTRIBUTES[field])
            phrase = phrase._replace(**{field: value})
        if any(phrase.matches(thing) for thing in scene.objects) == wanted:
            return f"Is there {_article(phrase)}?", "yes" if wanted else "no"


def _offset(thing: Thing, other: Thing, direction: str) -> float:
    """How many pixels `thing` lies in `direction` of `other`; negative on the other side."""
    return {
        "left of": other.x - thing.x,
        "right of": thing.x - other.x,
        "above": other.y - thing.y,
        "below": thing.y - other.y,
    }[direction]


def _compare(
    directions: tuple[str, ...], scene: Scene, rng: random.Random
) -> tuple[str, str] | None:
    for direction in rng.sample(directions, len(directions)):
        for thing in rng.sample(scene.objects, len(scene.objects)):
            for other in rng.sample(scene.objects, len(scene.objects)):
                offset = _offset(thing, other, direction)
                first = _reference(scene, rng, thing)
                second = _reference(scene, rng, other)
                if first and second and abs(offset) >= SEPARATION:
                    answer = "yes" if offset > 0 else "no"
                    return f"Is the {first} {direction} the {second}?", answer
    return None


def _beside(
    directions: tuple[str, ...], scene: Scene, rng: random.Random
) -> tuple[str, str] | None:
    for direction in rng.sample(directions, len(directions)):
        for thing in rng.sample(scene.objects, len(scene.objects)):
            others = [(o, _offset(o, thing, direction)) for o in scene.objects if o is not thing]
            there = [other for other, offset in others if offset > 0]
            clear = all(abs(offset) >= SEPARATION for _, offset in others)
            phrase = _reference(scene, rng, thing)
            if phrase and clear and len(there) == 1:
                answer = _article(Phrase(None, there[0].colour, there[0].shape))
                return f"What is {direction} the {phrase}?", answer
            if phrase and clear and not there and rng.random() < 0.3:
                return f"What is {direction} the {phrase}?", "nothing"
    return None


def _pattern(scene: Scene, _rng: random.Random) -> tuple[str, str]:
    return "What pattern is the background?", scene.background


FORMS: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "colour": partial(_attribute, "colour"),
    "shape": partial(_attribute, "shape"),
    "size": partial(_attribute, "size"),
    "count": _count,
    "exists": _exists,
    "is_beside": partial(_compare, BESIDE),
    "what_beside": partial(_beside, BESIDE),
    "is_above": partial(_compare, ABOVE),
    "what_above": partial(_beside, ABOVE),
    "background": _pattern,
}

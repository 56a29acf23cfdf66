"""The drawn scenes: same from the same seed, and true to what is in the picture."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from blip2.errors import Blip2Error
from demo import scenes
from demo.drawing import CANVAS, COLOURS, SEPARATION, SHAPES, SIZES, Scene, Thing, draw
from demo.scenes import EVALUATION_SEED, FORMS, caption, evaluation_set, questions

TOKENIZER = str(Path(scenes.__file__).parent / "checkpoint" / "tokenizer.json")
SEEDS = range(EVALUATION_SEED, EVALUATION_SEED + 60)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[int, Scene]]:
    return [(seed, draw(seed)) for seed in SEEDS]


def described(scene: Scene, words: str) -> list[Thing]:
    """The objects that "small red circle", "red objects", "object" ... could mean."""
    named = [
        re.sub(r"(?<=s)es$|s$", "", word) if word != "cross" else word for word in words.split()
    ]
    named = [word for word in named if word != "object"]
    return [o for o in scene.objects if set(named) <= {o.size, o.colour, o.shape}]


def asked(seed: int, scene: Scene) -> list[scenes.Question]:
    return questions(scene, random.Random(seed), FORMS)


def test_seed_decides_everything():
    first, second = draw(11), draw(11)
    assert first.objects == second.objects
    assert first.image.tobytes() == second.image.tobytes()
    assert asked(3, first) == asked(3, second)
    assert draw(12).image.tobytes() != first.image.tobytes()


def test_negative_seed_and_empty_set_are_user_errors():
    with pytest.raises(Blip2Error, match="seed is -1"):
        draw(-1)
    with pytest.raises(Blip2Error, match="0 scenes"):
        next(evaluation_set(EVALUATION_SEED, 0))


def test_objects_keep_apart_and_inside(drawn):
    for _, scene in drawn:
        for index, thing in enumerate(scene.objects):
            assert thing.radius <= thing.x <= CANVAS - thing.radius
            assert thing.radius <= thing.y <= CANVAS - thing.radius
            for other in scene.objects[index + 1 :]:
                distance = np.hypot(thing.x - other.x, thing.y - other.y)
                assert distance > thing.radius + other.radius
                assert other.x - thing.x >= SEPARATION


def test_each_object_has_its_colour_at_its_centre(drawn):
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    for _, scene in drawn:
        picture = np.asarray(scene.image).astype(int)
        for thing in scene.objects:
            pixel = picture[round(thing.y), round(thing.x)]
            assert names[np.abs(values - pixel).sum(1).argmin()] == thing.colour


def test_painted_area_tells_size_and_shape(drawn):
    # Share of the enclosing circle that each shape covers, from its geometry.
    share = {"circle": 0.81, "square": 0.64, "triangle": 0.41, "star": 0.39, "cross": 0.62}
    for _, scene in drawn:
        picture = np.asarray(scene.image).astype(int)
        rows, columns = np.mgrid[:CANVAS, :CANVAS]
        for thing in scene.objects:
            inside = np.hypot(columns - thing.x, rows - thing.y) <= thing.radius
            shade = picture[round(thing.y), round(thing.x)]
            painted = (np.abs(picture - shade).sum(2) < 12) & inside
            assert painted.sum() / (np.pi * thing.radius**2) == pytest.approx(
                share[thing.shape], abs=0.08
            )


def test_caption_names_every_object_from_left_to_right(drawn):
    for _, scene in drawn:
        listing, background = re.fullmatch(r"(.*) on a (\w+) background", caption(scene)).groups()
        assert background == scene.background
        parts = re.split(r", | and ", listing)
        for part, thing in zip(parts, sorted(scene.objects, key=lambda o: o.x), strict=True):
            assert re.fullmatch(rf"an? {thing.size} {thing.colour} {thing.shape}", part)
        assert "a orange" not in caption(scene)


def test_attribute_questions_mean_one_object_and_do_not_give_the_answer_away(drawn):
    for seed, scene in drawn:
        for form, text, answer in asked(seed, scene):
            if form in ("colour", "shape", "size"):
                (thing,) = described(scene, re.search(r"is the (.*)\?", text)[1])
                assert getattr(thing, form) == answer
                assert answer not in text.split()


def test_counts_and_existence(drawn):
    for seed, scene in drawn:
        for form, text, answer in asked(seed, scene):
            if form == "count":
                words = re.search(r"[Hh]ow many (.*) are there\?", text)[1]
                assert len(described(scene, words)) == int(answer)
            elif form == "exists":
                words = re.search(r"[Ii]s there an? (.*)\?", text)[1]
                assert (len(described(scene, words)) > 0) == (answer == "yes")
            elif form == "background":
                assert answer == scene.background


def offset(thing: Thing, other: Thing, direction: str) -> float:
    axis, sign = {
        "left of": ("x", -1),
        "right of": ("x", 1),
        "above": ("y", -1),
        "below": ("y", 1),
    }[direction]
    return sign * (getattr(thing, axis) - getattr(other, axis))


def test_relations_are_clear(drawn):
    directions = "left of|right of|above|below"
    found = set()
    for seed, scene in drawn:
        for form, text, answer in asked(seed, scene):
            if form in ("is_beside", "is_above"):
                match = re.fullmatch(rf"[Ii]s the (.*) ({directions}) the (.*)\?", text)
                (thing,), (other,) = described(scene, match[1]), described(scene, match[3])
                assert thing is not other
                distance = offset(thing, other, match[2])
                assert abs(distance) >= SEPARATION
                assert (distance > 0) == (answer == "yes")
            elif form in ("what_beside", "what_above"):
                match = re.fullmatch(rf"[Ww]hat is ({directions}) the (.*)\?", text)
                (thing,) = described(scene, match[2])
                others = [o for o in scene.objects if o is not thing]
                assert all(abs(offset(o, thing, match[1])) >= SEPARATION for o in others)
                there = [o for o in others if offset(o, thing, match[1]) > 0]
                wanted = rf"an? {there[0].colour} {there[0].shape}" if there else "nothing"
                assert len(there) <= 1
                assert re.fullmatch(wanted, answer)
            else:
                continue
            found.add((form, match[1] if form.startswith("what") else match[2], answer))
    assert len(found) > 20


def test_listing_names_every_object_from_top_to_bottom(drawn):
    for _, scene in drawn:
        form, text, answer = scenes.listing_from_top(scene)
        assert (form, text) == ("listing", "What objects are above and below?")
        parts = re.split(r", | and ", answer)
        for part, thing in zip(parts, sorted(scene.objects, key=lambda o: o.y), strict=True):
            assert re.fullmatch(rf"an? {thing.colour} {thing.shape}", part)
        assert "a orange" not in answer


def test_evaluation_set_is_every_form_of_its_seeds():
    examples = list(evaluation_set(EVALUATION_SEED, 5))
    assert {example.seed for example in examples} == set(SEEDS[:5])
    assert [e.question for e in examples if e.form == "caption"] == [""] * 5
    assert {example.form for example in examples} == {"caption", *FORMS}
    assert examples[0].image.size == (CANVAS, CANVAS)
    assert {e.form for e in evaluation_set(EVALUATION_SEED, 20, ["is_above"])} == {
        "caption",
        "is_above",
    }


def test_every_picture_is_trained_on_with_half_its_texts_about_heights():
    tokenizers = pytest.importorskip("tokenizers")
    from demo.examples import IGNORED, KINDS, PAD, training_batch

    tokenizer = tokenizers.Tokenizer.from_file(TOKENIZER)
    batch = training_batch(tokenizer, range(40))
    assert batch.pixels.shape == (40, 96, 96, 3)
    assert list(KINDS) == ["captions", "listings", *["above"] * 3, "beside", *["others"] * 2]
    compared: list[bool] = []
    for seed, all_ids, all_targets in zip(range(40), batch.ids, batch.targets, strict=True):
        scene = draw(seed)
        texts = [tokenizer.decode(ids[ids != PAD]) for ids in all_ids]
        wanted = [tokenizer.decode(targets[targets != IGNORED]) for targets in all_targets]
        listing = scenes.listing_from_top(scene)
        assert texts[0] == wanted[0] == f"{caption(scene)}\n"
        assert texts[1] == f"Question: {listing.text} Answer: {listing.answer}\n"
        for text, answer in zip(texts[1:], wanted[1:], strict=True):
            assert text.partition(" Answer:")[2] == answer
        heights = [bool(re.search("above|below", text)) for text in texts]
        assert heights[:2] + heights[5:] == [False, True, False, False, False]
        assert not any(re.search("left of|right of", text) for text in texts[6:])
        if len(scene.objects) > 1:  # else there is nothing to compare
            compared += heights[2:5]
    assert len(compared) > 60
    assert sum(compared) / len(compared) > 0.9  # objects may all be at about the same height


def test_vocabulary_is_closed_and_the_tokenizer_keeps_it():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(TOKENIZER)
    words = set()
    for example in evaluation_set(EVALUATION_SEED, 100, FORMS):
        completion = scenes.completion(example.question, example.answer)
        text = scenes.prompt(example.question) + completion
        encoded = tokenizer.encode(text)
        assert encoded.tokens[0] == "</s>"
        assert encoded.tokens[-1] == "Ċ"
        assert "<unk>" not in encoded.tokens
        assert tokenizer.decode(encoded.ids) == text
        words |= set(re.findall(r"\w+|\S", text))
    assert set(SHAPES) | set(COLOURS) | set(SIZES) <= words
    for word in words:
        lengths = [len(tokenizer.encode(w, add_special_tokens=False)) for w in (word, f" {word}")]
        assert min(lengths) == 1, word


def test_tokenizer_knows_every_byte():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(TOKENIZER)
    for text in ("naïve 東京 🙂\n", "\x00\x7f\t"):
        encoded = tokenizer.encode(text)
        assert "<unk>" not in encoded.tokens
        assert tokenizer.decode(encoded.ids) == text

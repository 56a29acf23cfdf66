"""VQA's accuracy: how often people gave an answer, once spelling and punctuation no longer count.

    accuracy("two dogs", ["2 dogs"] * 4 + ["dogs"] * 6)        # of one question, 0 to 1

The rules are those of the VQA challenge's evaluation (Antol et al., ICCV 2015; visualqa.org/evaluation)
in the form that LAVIS has them, oddities included: the published scores were counted by them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # "2.5" keeps its own, and so does ".5"
_MOST_PERIODS = 32
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
# Words that get an apostrophe back where one of theirs is missing. Whose other form is a word of its
# own (were, ill, shed) is not among them.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _spellings() -> dict[str, str]:
    """The word that each spelling stands for."""
    found = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTED.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }
    return {**found, "somebody'd": "somebodyd"}  # as the rules have it


_SPELLINGS = _spellings()


def without_punctuation(text: str) -> str:
    """The text without its marks: gone beside a blank, or with a number like 1,000; else a blank."""
    kept, has_thousands = text, _THOUSANDS.search(text)
    for mark in _MARKS:
        vanishes = has_thousands or f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", kept, count=_MOST_PERIODS)


def normalised(text: str) -> str:
    """An answer of the model's as it is compared with those of people."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """How right an answer is: 1 if three of the others gave it, averaged over who is left out.

    Of what people said only punctuation is removed, and that only where they disagree.
    """
    said = normalised(answer)
    if len(set(given)) > 1:
        given = [without_punctuation(text) for text in given]
    matches = [text == said for text in given]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(given)

"""CIDEr, BLEU and ROUGE of captions, as COCO's evaluation counts them: by pycocoevalcap.

    scores({1: "a dog on a sofa"}, {1: ["a dog lies on a couch", "a brown dog"]})

Its words are those of Stanford's Penn Treebank tokenizer, a Java program that pycocoevalcap brings
along. Without Java `split_words` takes its place: on plain sentences it finds the same words, but on
others (cannot, 1/2, w/, web addresses) scores may differ in the third digit.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Mapping, Sequence

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
NAMES = (*BLEU, "ROUGE-L", "CIDEr")
_ENDING = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?![\w'])")
_WORD = re.compile(
    r"n't|'(?:s|re|ve|ll|d|m)(?!\w)|-[lr][rsc]b-"  # endings, and brackets as they are written
    r"|(?:[a-z]\.){2,}|\w+(?:[-.,'/:]\w+)*|[$%&#@*+/=]"
)
_BRACKETS = {"(": "lrb", ")": "rrb", "[": "lsb", "]": "rsb", "{": "lcb", "}": "rcb"}


def has_java() -> bool:
    """Whether captions are split into words as COCO's evaluation does."""
    return shutil.which("java") is not None


def scores(answers: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Each of NAMES, times 100, over all pictures.

    Args:
        answers: a caption for each picture's id.
        references: what people wrote about it, for the same ids.

    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    split = _split_by_java if has_java() else _split
    given = split({key: [answers[key]] for key in references})
    expected = split(references)
    with contextlib.redirect_stdout(io.StringIO()):  # they print as they go
        bleu, _ = Bleu(4).compute_score(expected, given)
        rouge, _ = Rouge().compute_score(expected, given)
        cider, _ = Cider().compute_score(expected, given)
    return {name: 100 * float(v) for name, v in zip(NAMES, (*bleu, rouge, cider), strict=True)}


def split_words(caption: str) -> str:
    """The words of a caption in small letters, with a blank between; punctuation is left out."""
    text = _ENDING.sub(r" \1", caption.lower())
    for bracket, name in _BRACKETS.items():
        text = text.replace(bracket, f" -{name}- ")
    return " ".join(_WORD.findall(text))


def _split(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    return {key: [split_words(text) for text in texts] for key, texts in captions.items()}


def _split_by_java(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    listed = {key: [{"caption": text} for text in texts] for key, texts in captions.items()}
    words = PTBTokenizer().tokenize(listed)
    # An empty caption at the end is left out by it.
    return {key: words.get(key, [""]) for key in captions}

"""What the README claims of the real model, and whether it held here."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.published import PRECISIONS
from bench.published.pictures import GUIDE_QUESTION
from bench.published.steps import Step

PASS, FAIL, NOT_TRIED = "pass", "FAIL", "not tried"
_TIE = 0.05  # of logits, or log probabilities: closer than that, rounding to 16 bits decides
_FLOAT16 = 1e-2  # relative error of features; on random weights it is 2e-3
_LOG_PROB = 0.02  # mean log probability of an answer's tokens
_EIGHT_BITS = 0.14  # above which onnx_export.py refuses a ViT
Result = Mapping[str, Any]  # of bench.published.answers or bench.published.reference


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, and what came of it."""

    text: str
    outcome: str
    detail: str

    @classmethod
    def of(cls, text: str, holds: bool, detail: str) -> Claim:
        """One that was tried."""
        return cls(text, PASS if holds else FAIL, detail)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How many answers have transformers' ids; `others` says of those that have not."""

    same: int
    ties: int
    total: int
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        ties = f", {self.ties} part at a tie" if self.ties else ""
        return f"{self.same} of {self.total} have the same ids{ties}"


def judge(
    steps: Mapping[str, Step], precisions: Iterable[str], city: str | None, on_gpu: bool
) -> list[Claim]:
    """Every claim, of the steps by name.

    Args:
        steps: those that were run or left out.
        precisions: of OPT.
        city: the answer to expect to the guide's question, if somebody knows.
        on_gpu: whether this suite ran on one.
    """
    run = {p: steps[f"{p}: answers"] for p in precisions if f"{p}: answers" in steps}
    results = {p: step.result for p, step in run.items() if not step.failed}
    truth, ours = steps["transformers"].result, results.get("float16")
    claims = [*map(_commands, _groups(steps)), _expected(steps, city)]
    claims += _against(truth, ours, steps["transformers"].failed, run)
    claims += [_checkpoint(steps), _smaller(steps, results, on_gpu)]
    fast = steps["transformers, float16"].result if on_gpu else truth
    claims += [_faster(results, fast, decoding) for decoding in ("greedy", "beams")]
    return claims + [_eight_bits(step) for name, step in steps.items() if name.startswith("ViT in")]


def agreement(truth: Result, found: Result, decoding: str) -> Agreement:
    """Compare the ids of all answers of one way to decode."""
    same = ties = total = 0
    others = []
    for right, answer in zip(truth["answers"], found["answers"], strict=True):
        if right["decoding"] != decoding:
            continue
        total += 1
        if right["ids"] == answer["ids"]:
            same += 1
        elif _is_tie(right, answer):
            ties += 1
        else:
            others.append(f"{right['text']!r} / {answer['text']!r}")
    return Agreement(same, ties, total, tuple(others))


def _is_tie(right: Result, answer: Result) -> bool:
    """Whether transformers itself was undecided where two answers part."""
    if right["decoding"] != "greedy":
        return abs(right["log_prob"] - answer["log_prob"]) < _TIE
    pairs = zip(right["ids"], answer["ids"], strict=False)
    shorter = min(len(right["ids"]), len(answer["ids"]))
    parting = next((n for n, (a, b) in enumerate(pairs) if a != b), shorter)
    return right["gaps"][parting] < _TIE


def _groups(steps: Mapping[str, Step]) -> Iterable[tuple[str, list[Step]]]:
    yield "onnx_export.py exports it", [steps["export"]]
    for precision in PRECISIONS:
        group = [steps[f"{precision}: {name}"] for name in ("convert", "run", "answers")]
        yield f"It is converted, and answers, in {precision}", group


def _commands(group: tuple[str, list[Step]]) -> Claim:
    text, steps = group
    wrong = next((step for step in steps if step.failed), None)
    if wrong is None:
        return Claim(text, PASS, f"{sum(step.seconds for step in steps):.0f} s")
    if wrong.failed.startswith(NOT_TRIED):
        return Claim(text, NOT_TRIED, wrong.failed.removeprefix(f"{NOT_TRIED}: "))
    return Claim(text, FAIL, f"{wrong.name}: {wrong.failed}")


def _expected(steps: Mapping[str, Step], city: str | None) -> Claim:
    text = f"The guide's question, {GUIDE_QUESTION!r}, is answered rightly"
    found = steps["float16: run"].result.get("text")
    if city is None:
        return Claim(text, NOT_TRIED, f"another picture, or another checkpoint; {found!r}")
    if found is None:
        return Claim(text, NOT_TRIED, "float16 has not answered")
    return Claim.of(text, city in found.lower(), repr(found))


def _against(
    truth: Result, ours: Result | None, failed: str, run: Mapping[str, Step]
) -> Iterable[Claim]:
    """What transformers in float32 confirms of float16."""
    texts = {
        "pixels": "Pictures are prepared as transformers does, bit for bit",
        "prompts": "Prompts have the ids that transformers' tokenizer gives them",
        "errors": f"The ViT and the Q-Former in float16 are within {_FLOAT16:.0%} of float32",
        "greedy": "Greedy answers in float16 have transformers' ids, but for ties",
        "beams": "So have those of 5 beams",
        "log_prob": f"Log probabilities of answers are transformers', within {_LOG_PROB}",
    }
    if failed or ours is None:
        why = failed or (run["float16"].failed if "float16" in run else "float16 has not run")
        why = why.removeprefix(f"{NOT_TRIED}: ")
        return [Claim(text, NOT_TRIED, why) for text in texts.values()]
    pairs = list(zip(truth["answers"], ours["answers"], strict=True))
    same = sum(ours["pixels"].get(file) == value for file, value in truth["pixels"].items())
    worst = [max(errors) for errors in zip(*ours["errors"].values(), strict=True)]
    counts = {name: agreement(truth, ours, name) for name in ("greedy", "beams")}
    gaps = [abs(r["log_prob"] - a["log_prob"]) for r, a in pairs if r["ids"] == a["ids"]]
    claims = [
        Claim.of(
            texts["pixels"],
            same == len(truth["pixels"]),
            f"{same} of {len(truth['pixels'])} pictures",
        ),
        _prompts(texts["prompts"], truth, ours),
        Claim.of(
            texts["errors"],
            max(worst) <= _FLOAT16,
            f"at most {worst[0]:.1e} and {worst[1]:.1e}, relative",
        ),
    ]
    for name, count in counts.items():
        detail = "; ".join([str(count), *count.others])
        claims.append(Claim.of(texts[name], count.same + count.ties == count.total, detail))
    most = max(gaps, default=0.0)
    claims.append(Claim.of(texts["log_prob"], most <= _LOG_PROB, f"at most {most:.1e} off"))
    return claims


def _prompts(text: str, truth: Result, ours: Result) -> Claim:
    if truth["prompts"] is None:
        return Claim(text, NOT_TRIED, "transformers reads no tokenizer from this checkpoint")
    same = sum(ours["prompts"].get(prompt) == ids for prompt, ids in truth["prompts"].items())
    return Claim.of(
        text, same == len(truth["prompts"]), f"{same} of {len(truth['prompts'])} prompts"
    )


def _checkpoint(steps: Mapping[str, Step]) -> Claim:
    text = "run.py takes the checkpoint itself, and answers the same"
    step, exported = steps["checkpoint: run"], steps["float16: run"]
    if step.failed or exported.failed:
        why = step.failed or exported.failed
        outcome = NOT_TRIED if why.startswith(NOT_TRIED) else FAIL
        return Claim(text, outcome, why.removeprefix(f"{NOT_TRIED}: "))
    found, expected = step.result["text"], exported.result["text"]
    return Claim.of(text, found == expected, f"{found!r}, {expected!r} from files")


def _smaller(steps: Mapping[str, Step], results: Mapping[str, Result], on_gpu: bool) -> Claim:
    text = "OPT in INT8 takes less memory than in float16, in INT4 less again"
    if on_gpu:
        return Claim(text, NOT_TRIED, "of a GPU's memory the system says nothing here")
    memory = [steps[f"{p}: answers"].memory for p in PRECISIONS if p in results]
    if len(memory) < 2 or not all(memory):
        return Claim(text, NOT_TRIED, "one precision alone has answered")
    listed = ", ".join(f"{size / 1e9:.2f}" for size in memory)
    return Claim.of(text, memory == sorted(memory, reverse=True), f"{listed} GB at most")


def _faster(results: Mapping[str, Result], truth: Result, decoding: str) -> Claim:
    name = "5 beams" if decoding == "beams" else "one answer"
    text = f"From a picture to {name} every precision is faster than transformers"
    if not truth or not results:
        return Claim(text, NOT_TRIED, "one of the two has not answered")
    stage = f"picture to answer, {decoding}"
    theirs = statistics.median(truth["seconds"][stage])
    times = {p: theirs / statistics.median(r["seconds"][stage]) for p, r in results.items()}
    listed = ", ".join(f"{p} {times_as_fast:.1f}x" for p, times_as_fast in times.items())
    return Claim.of(text, min(times.values()) > 1, listed)


def _eight_bits(step: Step) -> Claim:
    text = f"The {step.name} is off by at most {_EIGHT_BITS:.0%}, or the export refuses it"
    if step.failed.startswith(NOT_TRIED):
        return Claim(text, NOT_TRIED, step.failed.removeprefix(f"{NOT_TRIED}: "))
    if step.failed:
        return Claim.of(text, step.failed.startswith("error: "), step.failed)
    return Claim(text, PASS, step.printed.splitlines()[0])

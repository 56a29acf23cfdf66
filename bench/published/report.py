"""The report: one Markdown file, which is all that somebody needs to know what held on a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.published.claims import FAIL, PASS, Claim, agreement
from bench.published.pictures import Item
from bench.published.steps import ROOT, Step

PACKAGES = (
    *("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy", "pillow"),
    *("onnx", "onnxscript", "onnxruntime", "triton", "cuda-bindings", "scikit-image"),
)
STAGES = (
    *("ViT", "Q-Former", "OPT, greedy", "OPT, beams"),
    *("picture to answer, greedy", "picture to answer, beams"),
)


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """What this is run on."""
    found = {"system": platform.platform(), "processor": _processor(), "cores": str(_cores())}
    query = "name,compute_cap,driver_version,memory.total"
    if gpu := _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"):
        found["GPU"] = "; ".join(gpu.splitlines())
    if commit := _said("git", "describe", "--always", "--dirty"):
        found["this suite"] = commit
    return found


def markdown(
    model: str,
    files: str,
    needs: str,
    claims: Sequence[Claim],
    steps: Mapping[str, Step],
    items: Sequence[Item],
) -> str:
    """The whole report.

    Args:
        model: the checkpoint, as it was given.
        files: what is known of its files.
        needs: what was said before.
        claims: what held.
        steps: everything that was run, by name.
        items: what was asked.
    """
    counts = {outcome: sum(c.outcome == outcome for c in claims) for outcome in (PASS, FAIL)}
    rest = len(claims) - sum(counts.values())
    verdict = f"{counts[PASS]} claims pass, {counts[FAIL]} fail, {rest} not tried"
    answering = {
        name.removesuffix(": answers"): step.result
        for name, step in steps.items()
        if step.result.get("answers")
    }
    parts = [
        f"# {model}: {verdict}",
        f"Files: {files}.",
        "## Claims",
        _table(["claim", "", ""], ([c.text, c.outcome, c.detail] for c in claims)),
        "## Machine and versions",
        _table(["", ""], [*machine().items(), *versions().items()]),
        f"Before it began it said:\n\n```\n{needs}\n```",
        "## Answers",
        _agreements(answering),
        *_answers(answering, items),
        "## Times",
        "Milliseconds, medians over all answers; transformers' OPT is its `generate` without its ViT"
        " and Q-Former.",
        _times(answering),
        "## Steps",
        "GB are the most that a process held, with the pages of files that it maps, which the system"
        " takes back where it needs them.",
        _table(
            ["step", "", "s", "GB at most", "command"],
            (
                [
                    step.name,
                    step.failed or PASS,
                    f"{step.seconds:.1f}",
                    f"{step.memory / 1e9:.1f}",
                    f"`{step.command}`" if step.command else "",
                ]
                for step in steps.values()
            ),
        ),
        *_outputs(steps.values()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _agreements(answering: Mapping[str, Any]) -> str:
    truth = answering.get("transformers")
    if truth is None:
        return ""
    rows = []
    for name, result in answering.items():
        if result is not truth:
            counts = [str(agreement(truth, result, way)) for way in ("greedy", "beams")]
            errors = [max(e) for e in zip(*result.get("errors", {}).values(), strict=True)]
            shown = [f"{error:.1e}" for error in errors] or ["", ""]
            rows.append([name, *counts, *shown])
    head = ["", "greedy", "5 beams", "ViT, relative error", "Q-Former, relative error"]
    return f"Beside transformers in {truth['dtype']}:\n\n" + _table(head, rows)


def _answers(answering: Mapping[str, Any], items: Sequence[Item]) -> Iterable[str]:
    for decoding in ("greedy", "beams"):
        rows = []
        for item in items:
            row = [item.name]
            for result in answering.values():
                [found] = (
                    answer["text"]
                    for answer in result["answers"]
                    if answer["decoding"] == decoding
                    and (answer["file"], answer["prompt"]) == (item.file, item.prompt)
                )
                row.append(found)
            rows.append(row)
        yield f"### {'Greedy' if decoding == 'greedy' else '5 beams'}\n\n" + _table(
            ["", *answering], rows
        )


def _times(answering: Mapping[str, Any]) -> str:
    rows = []
    for stage in ("load", *STAGES):
        row = [stage]
        for result in answering.values():
            seconds = result["seconds"]
            if stage == "load":
                row.append(f"{1e3 * result['load_seconds']:.0f}")
            elif stage in seconds:
                row.append(f"{1e3 * statistics.median(seconds[stage]):.1f}")
            elif stage.startswith("OPT"):
                whole = statistics.median(seconds[stage.replace("OPT", "picture to answer")])
                before = sum(statistics.median(seconds[part]) for part in ("ViT", "Q-Former"))
                row.append(f"{1e3 * (whole - before):.1f}")
        rows.append(row)
    return _table(["", *answering], rows)


def _outputs(steps: Iterable[Step]) -> Iterable[str]:
    """What programs printed last, where it says more than that they were done."""
    yield "## What was printed"
    for step in steps:
        if step.printed and not step.result.get("answers"):
            yield f"{step.name}:\n\n```\n{step.printed}\n```"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(content: object) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(content))
    text = text.replace("|", "\\|")
    return f"**{text}**" if text == FAIL else text


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _said(*command: str) -> str:
    """What a program prints; nothing where it is not there, or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""Run all that needs TensorRT and TensorRT-LLM once, on the demo checkpoint; say how it went.

    python -m bench.tensorrt_check 2>&1 | tee check.txt      # some 15 minutes, on an NVIDIA GPU
    python -m bench.tensorrt_check --precision fp16 --batch_size 1 --num_beams 1         # less of it

In the environment of requirements-tensorrt.txt: exports, builds the plans, converts, builds engines
and asks about drawn scenes through run.py, in every precision, for several batches and beams. Each
answer is compared with the native session's. A leg that fails is reported, and the others go on; the
last lines are a table of them. The whole output is what a report of a failure needs.

What the suite's usual environment does, exporting, converting and the native session, is done by
--native_python.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not with -m

from blip2 import artifacts, cli, images
from blip2.checkpoints import QFormerConfig, open_checkpoint
from blip2.errors import Blip2Error
from blip2.images import Preprocessing
from blip2.language.trtllm_build import EngineLimits, build_command
from blip2.language.trtllm_engine import CONTINUOUS, PAGED
from blip2.language.trtllm_format import OPTCheckpointConfig
from demo import scenes

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "demo" / "checkpoint"
RUN = ROOT / "run.py"
USUAL_PYTHON = ROOT / ".venv" / "bin" / "python"
PRECISIONS = {
    "fp16": (),
    "int8": ("--weight_only_precision", "int8"),
    "int4": ("--weight_only_precision", "int4"),
}
MAX_OUTPUT_LEN = 40  # tokens, more than any caption of a scene has
LONGEST = 1800  # seconds that a command may take before it counts as hung
VERSIONS = """
import importlib.metadata, platform, sys
print("Python", platform.python_version(), sys.executable)
for name in sys.argv[1:]:
    try: print(f"  {name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError: pass
"""
PACKAGES = (
    *(
        "torch",
        "torchvision",
        "numpy",
        "tensorrt",
        "tensorrt_cu12",
        "tensorrt_cu13",
        "tensorrt_rtx",
    ),
    *("tensorrt_llm", "mpi4py", "cuda-bindings", "cuda-python", "triton", "transformers"),
    *("tokenizers", "safetensors", "onnx", "onnxscript", "onnxruntime"),
)


def main() -> int:
    parser = cli.ArgumentParser("Try every leg that needs TensorRT or TensorRT-LLM.")
    add = parser.add_argument
    add("--directory", type=Path, help="for what is made, and kept (default: erased at the end)")
    add(
        "--native_python",
        default=str(USUAL_PYTHON if USUAL_PYTHON.exists() else sys.executable),
        help="Python that has requirements.txt",
    )
    add("--precision", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    add("--batch_size", nargs="+", type=cli.int_between(1, 8), default=[1, 3, 8])
    add("--num_beams", nargs="+", type=cli.int_between(1, 5), default=[1, 5])
    add("--benchmark", type=cli.positive_int, default=3, metavar="N", help="repeats to time")
    args = parser.parse_args()
    found = shutil.which(args.native_python)
    if found is None:
        raise Blip2Error(
            f"--native_python {args.native_python} cannot be run",
            "name a Python that has requirements.txt",
        )
    # Not resolved: a link in an environment is what makes it that environment's Python.
    args.native_python = os.path.abspath(found)
    if args.directory and args.directory.exists():
        raise Blip2Error(f"{args.directory} exists", "name another --directory")
    print_versions(args.native_python)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        legs = Check(args, directory.resolve()).legs()
    print("\n" + table(legs))
    return 0 if all(leg.result == "pass" for leg in legs) else 1


@dataclasses.dataclass(frozen=True)
class Leg:
    """One thing that was tried. `result` is pass, FAIL or skipped; `stages` are milliseconds."""

    name: str
    result: str
    seconds: float = 0.0
    detail: str = ""
    stages: dict[str, float] = dataclasses.field(default_factory=dict)


class Check:
    """Runs the legs in the order in which they need one another."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self._args, self._directory = args, directory
        self._legs: list[Leg] = []
        self._expected: dict[tuple[str, int, int], Any] = {}

    def legs(self) -> list[Leg]:
        """Everything that was tried."""
        checkpoint = open_checkpoint(str(CHECKPOINT))
        self._draw(Preprocessing.of(checkpoint))
        # For the traceback: run.py says in a line why it cannot be imported.
        self._tried("import tensorrt_llm", [sys.executable, "-c", "import tensorrt_llm"])
        exported = self._tried(
            "export",
            [
                *(self._args.native_python, ROOT / "onnx_export.py", "--model_dir", CHECKPOINT),
                *("--image", ROOT / "demo" / "scene.png", "--output_dir", self._directory),
            ],
        )
        build = [sys.executable, ROOT / "build_vit_qformer.py", "all"]
        build += ["--onnx_dir", self._directory / "onnx", "--plan_dir", self._directory / "plan"]
        planned = self._tried("plans", build) if exported else self._add(Leg("plans", "skipped"))
        for precision in self._args.precision:
            self._precision(precision, planned, QFormerConfig.of(checkpoint).num_query_tokens)
        return self._legs

    def _draw(self, preprocessing: Preprocessing) -> None:
        """Save pictures of scenes as run.py takes several."""
        import torch

        for batch in self._args.batch_size:
            drawn = [scenes.draw(scenes.EVALUATION_SEED + n).image for n in range(batch)]
            pixels = [images.pixel_values(image, preprocessing) for image in drawn]
            artifacts.save_tensor(torch.stack(pixels), self._directory / f"pictures-{batch}.pt")

    def _precision(self, precision: str, planned: bool, num_query_tokens: int) -> None:
        """Convert, answer natively, build the engines and answer from them."""
        opt = self._directory / "opt" / precision
        command = [self._args.native_python, ROOT / "opt" / "convert_checkpoint.py"]
        command += ["--model_dir", CHECKPOINT, "--output_dir", opt, *PRECISIONS[precision]]
        if not self._tried(f"{precision}: convert", command):
            return
        plan = self._directory / "plan"
        for batch, beams in self._asked():
            self._native(precision, batch, beams, opt)
        if planned:
            name = f"{precision}: plans, native OPT"
            passed = [self._ask(name, precision, *asked, plan, opt) for asked in self._asked()]
            planned = any(passed)
        # Engines are tried whether or not plans can be built and run.
        vision, seen = (plan, "plans") if planned else (CHECKPOINT, "native ViT")
        # ModelRunner and ModelRunnerCpp are one code each, whatever the precision.
        for kv_cache_type in (PAGED, CONTINUOUS) if precision == "fp16" else (PAGED,):
            name = f"{precision}, {kv_cache_type}"
            engine = self._directory / "engine" / precision / kv_cache_type
            built = self._build(name, opt, engine, num_query_tokens, kv_cache_type)
            for batch, beams in self._asked():
                what = f"{name}: {seen}, engine"
                if built:
                    self._ask(what, precision, batch, beams, vision, engine)
                else:
                    self._add(Leg(_asked_name(what, batch, beams), "skipped"))

    def _asked(self) -> list[tuple[int, int]]:
        return [(batch, beams) for batch in self._args.batch_size for beams in self._args.num_beams]

    def _build(
        self, name: str, opt: Path, engine: Path, num_query_tokens: int, kv_cache_type: str
    ) -> bool:
        name = f"{name}: trtllm-build"
        try:
            version = importlib.metadata.version("tensorrt_llm")
            path = opt / "config.json"
            config = OPTCheckpointConfig.from_json(json.loads(path.read_text()), path)
            limits = EngineLimits.within(config.max_position_embeddings)
            text = build_command(
                opt, engine, config, num_query_tokens, version, limits, kv_cache_type
            )
        except importlib.metadata.PackageNotFoundError:
            return self._add(Leg(name, "FAIL", detail="tensorrt_llm is not installed"))
        except Blip2Error as error:
            return self._add(Leg(name, "FAIL", detail=str(error)))
        program, *flags = shlex.split(text.replace("\\\n", ""))
        beside = Path(sys.executable).parent / program  # where the environment is not activated
        found = str(beside) if beside.exists() else shutil.which(program) or program
        return self._tried(name, [found, *flags])

    def _native(self, precision: str, batch: int, beams: int, opt: Path) -> None:
        name = _asked_name(f"{precision}: native", batch, beams)
        python = self._args.native_python
        done, seconds = self._run(self._question(python, batch, beams, CHECKPOINT, opt))
        answers = _answers_in(done)
        if answers is None:
            self._add(Leg(name, "FAIL", seconds, _reason(done)))
        else:
            self._expected[precision, batch, beams] = answers
            self._add(Leg(name, "pass", seconds, _best(answers)[0], _stages(done)))

    def _ask(
        self, what: str, precision: str, batch: int, beams: int, vision: Path, opt: Path
    ) -> bool:
        name = _asked_name(what, batch, beams)
        done, seconds = self._run(self._question(sys.executable, batch, beams, vision, opt))
        answers, expected = _answers_in(done), self._expected.get((precision, batch, beams))
        if answers is None:
            return self._add(Leg(name, "FAIL", seconds, _reason(done)))
        same, detail = False, "no native answers to compare with"
        if expected is not None:
            same, detail = compare(answers, expected)
        return self._add(Leg(name, "pass" if same else "FAIL", seconds, detail, _stages(done)))

    def _question(self, python: str, batch: int, beams: int, vision: Path, opt: Path) -> list[Any]:
        return [
            *(python, RUN, "--engine_dir", vision, "--opt_engine_dir", opt, "--input_text", ""),
            *("--input_dir", self._directory / f"pictures-{batch}.pt", "--num_beams", beams),
            *("--max_output_len", MAX_OUTPUT_LEN, "--json", "--benchmark", self._args.benchmark),
        ]

    def _tried(self, name: str, command: Sequence[object]) -> bool:
        """Whether a command succeeds, as a leg of that name."""
        done, seconds = self._run(command)
        passed = done.returncode == 0
        return self._add(
            Leg(name, "pass" if passed else "FAIL", seconds, "" if passed else _reason(done))
        )

    def _add(self, leg: Leg) -> bool:
        self._legs.append(leg)
        print(f"-- {leg.name}: {leg.result} {leg.detail}", flush=True)
        return leg.result == "pass"

    def _run(self, command: Sequence[object]) -> tuple[subprocess.CompletedProcess[str], float]:
        """Run a command, show it and all that it prints; one that cannot be run has failed."""
        words = [str(word) for word in command]
        print(f"\n$ {shlex.join(words)}", flush=True)
        start = time.perf_counter()
        try:
            # In the directory, as trtllm-build leaves a file in the current one.
            done = subprocess.run(
                words,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST,
            )
        except OSError as error:
            done = subprocess.CompletedProcess(words, 127, "", f"{words[0]}: {error.strerror}")
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(words, 124, "", f"not done after {LONGEST} s")
        seconds = time.perf_counter() - start
        print(done.stdout + done.stderr, end="", flush=True)
        print(f"[exit code {done.returncode}, {seconds:.1f} s]", flush=True)
        return done, seconds


def compare(answers: list[list[dict]], expected: list[list[dict]]) -> tuple[bool, str]:
    """Whether the best answer about each picture is the expected one, and how many answers are.

    Lower beams may change places where their scores are nearly equal.
    """
    best = [found == right for found, right in zip(_best(answers), _best(expected), strict=False)]
    whole = len(answers) == len(expected)
    pairs = [
        found["text"] == right["text"]
        for beams, rights in zip(answers, expected, strict=False)
        for found, right in zip(beams, rights, strict=False)
    ]
    detail = f"{sum(best)} of {len(expected)} as native"
    if len(pairs) > len(best):
        detail += f", {sum(pairs)} of {len(pairs)} beams"
    if not all(best):
        wrong = best.index(False)
        detail += f"; {_best(answers)[wrong]!r}, natively {_best(expected)[wrong]!r}"
    return whole and all(best), detail


def _best(answers: list[list[dict]]) -> list[str]:
    return [beams[0]["text"] for beams in answers]


def _answers_in(done: subprocess.CompletedProcess[str]) -> list[list[dict]] | None:
    """The answers that run.py --json printed, or None; other libraries may print before it."""
    result = _result_in(done)
    return result["answers"] if result else None


def _result_in(done: subprocess.CompletedProcess[str]) -> dict[str, Any] | None:
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def _stages(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    return {name: seconds * 1e3 for name, seconds in _result_in(done)["seconds"].items()}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """What a program that failed said last."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def _asked_name(what: str, batch: int, beams: int) -> str:
    return f"{what}, {_count(batch, 'picture')}, {_count(beams, 'beam')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def print_versions(native_python: str) -> None:
    """What an answer to a report needs to know first."""
    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    commands = [["nvidia-smi", query, "--format=csv,noheader"]]
    for python in dict.fromkeys([sys.executable, native_python]):
        commands.append([python, "-c", VERSIONS, *PACKAGES])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            print((done.stdout + done.stderr).rstrip())
        except OSError as error:
            print(f"{command[0]}: {error.strerror}")
    sys.stdout.flush()


def table(legs: Sequence[Leg]) -> str:
    """A line a leg, and how many passed."""
    width = max(len(leg.name) for leg in legs)
    head = f"{'leg':<{width}} {'result':<8}{'seconds':>8}{'ViT':>9}{'Q-Former':>9}{'OPT':>9} ms"
    lines = [head]
    for leg in legs:
        stages = "".join(
            f"{leg.stages[name]:>9.2f}" if name in leg.stages else " " * 9
            for name in ("ViT", "Q-Former", "OPT")
        )
        line = f"{leg.name:<{width}} {leg.result:<8}{leg.seconds:>8.1f}{stages}    {leg.detail}"
        lines.append(line.rstrip())
    counts = {result: sum(leg.result == result for leg in legs) for result in ("pass", "FAIL")}
    skipped = len(legs) - sum(counts.values())
    lines.append(f"{counts['pass']} passed, {counts['FAIL']} failed, {skipped} skipped")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)

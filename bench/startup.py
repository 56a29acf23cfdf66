"""From the command to the answer on an NVIDIA GPU, measured from outside the process.

    python -m bench.startup                        # random weights of the real shapes: no download
    python -m bench.startup --onnx                 # and from exported ONNX files, which takes minutes
    python -m bench.startup --model_dir DIRECTORY  # a BLIP-2 of your own

Each line is a process that asks one question about one picture, in float16: `run.py` from a
checkpoint, from converted files and from ONNX files, from the same copied from another machine, and
transformers. The first start of each finds no kernels compiled, and of copied files none verified;
later ones find what it left. Files are in the page cache for all.
"Whole" is from the command to the last line, "after torch" the same without what `python -c "import
torch"` takes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from blip2 import cli

ROOT = Path(__file__).parent.parent
QUESTION = "Question: which city is this? Answer:"
TOKENS = 30
VOCABULARY = 50272  # tokens, of OPT
LOADED = ("start", "load engines")  # the stages before the picture is looked at


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds of one process: from outside, and what it says itself."""

    whole: float
    start: float
    load: float
    first: float
    second: float | None = None


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        work = Path(directory)
        model = args.model_dir or random_checkpoint(work / "checkpoint")
        picture = draw_picture(work / "picture.png")
        opt, export = work / "opt", work / "export"
        convert = ["opt/convert_checkpoint.py", "--model_dir", model, "--output_dir", opt]
        run(*convert)
        checkpoint = ["--engine_dir", model, "--opt_engine_dir"]
        ways = {
            "checkpoint": ([*checkpoint, model], []),
            "converted OPT": ([*checkpoint, opt], [convert]),
            "converted OPT, copied": ([*checkpoint, opt], []),
        }
        if args.onnx:
            make = ["onnx_export.py", "--model_dir", model, "--image", picture]
            make += ["--output_dir", export]
            run(*make)
            flags = ["--engine_dir", export / "onnx", "--opt_engine_dir", opt]
            flags += ["--query_tokens", export / "query_tokens.pt"]
            ways["ONNX files, copied"] = (flags, [])
        torch_seconds = statistics.median(
            timed([sys.executable, "-c", "import torch"])[0] for _ in range(args.repeats)
        )
        print(f"import torch: {torch_seconds:.2f} s, median of {args.repeats}")
        print(f"{'':<36}{'whole':>8}{'after torch':>13}{'start':>8}{'load':>8}", end="")
        print(f"{'1st answer':>12}{'2nd answer':>12}", flush=True)
        for name, (flags, made_by) in ways.items():
            flags = [*map(str, flags), "--input_dir", str(picture)]
            with empty_caches(work) as environment:
                for command in made_by:
                    run(*command, environment=environment)
                line(f"{name}, first start", torch_seconds, ask(flags, environment))
                starts = [ask(flags, environment) for _ in range(args.repeats)]
                middle = sorted(starts, key=lambda start: start.whole)[len(starts) // 2]
                second = second_answer(flags, environment)
            line(f"{name}, later", torch_seconds, dataclasses.replace(middle, second=second))
        for name in ("first start", "later"):
            line(f"transformers, {name}", torch_seconds, ask_transformers(model, picture))


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Time a question from the shell, beside transformers.")
    parser.add_argument(
        "--model_dir", type=Path, help="BLIP-2 checkpoint (default: random weights)"
    )
    parser.add_argument("--directory", help="for files, erased at the end (default: /tmp)")
    parser.add_argument("--onnx", action="store_true", help="export to ONNX too")
    parser.add_argument("--repeats", type=cli.positive_int, default=3)
    return parser.parse_args()


def random_checkpoint(directory: Path) -> Path:
    """In a process of its own, whose memory ends with it."""
    directory.mkdir()
    code = "import sys, pathlib; from bench.random_blip2 import random_model;"
    run("-c", f"{code} random_model(pathlib.Path(sys.argv[1]))", directory)
    demo = ROOT / "demo" / "checkpoint"
    shutil.copy(demo / "tokenizer_config.json", directory)
    tokenizer = json.loads((demo / "tokenizer.json").read_text("utf-8"))
    # Every id that the model may choose is a word: answers are as long as text as they are in tokens.
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    vocabulary |= {f"\u0120{n}": n for n in range(len(vocabulary), VOCABULARY)}  # that is a blank
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return directory


def draw_picture(path: Path) -> Path:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@contextlib.contextmanager
def empty_caches(parent: Path) -> Iterator[dict[str, str]]:
    """The environment of a user who has run nothing yet."""
    with tempfile.TemporaryDirectory(dir=parent) as cache:
        places = {"TRITON_CACHE_DIR": f"{cache}/triton", "CUDA_CACHE_PATH": f"{cache}/nv"}
        yield {**os.environ, "XDG_CACHE_HOME": cache, **places}


def timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Seconds from a command to the last line that it printed, or its end, and those lines."""
    started = time.perf_counter()
    printed, seconds = [], 0.0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        for line in process.stdout:
            seconds = time.perf_counter() - started
            printed.append(line)
        if process.wait():
            errors.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}\n{errors.read()}")
    return seconds or time.perf_counter() - started, "".join(printed)


def run(*arguments: object, environment: dict[str, str] | None = None) -> None:
    timed([sys.executable, *map(str, arguments)], environment)


def _run_py(flags: list[str]) -> list[str]:
    asked = ["--input_text", QUESTION, "--max_txt_len", "64", "--max_output_len", str(TOKENS)]
    return [sys.executable, "run.py", *flags, *asked, "--json"]


def ask(flags: list[str], environment: dict[str, str]) -> Start:
    whole, printed = timed(_run_py(flags), environment)
    stages = json.loads(printed)["seconds"]
    first = sum(seconds for stage, seconds in stages.items() if stage not in LOADED)
    return Start(whole, stages["start"], stages["load engines"], first)


def second_answer(flags: list[str], environment: dict[str, str]) -> float:
    """Seconds of an answer in a process that has given some already."""
    _, printed = timed([*_run_py(flags), "--benchmark", "5"], environment)
    return sum(json.loads(printed)["seconds"].values())


def ask_transformers(model: Path, picture: Path) -> Start:
    whole, printed = timed([sys.executable, "-m", "bench.startup_transformers", model, picture])
    return Start(whole, *json.loads(printed.splitlines()[-1]))


def line(name: str, torch_seconds: float, start: Start) -> None:
    figures = (start.start, start.load)
    second = "" if start.second is None else f"{start.second:>10.3f} s"
    print(f"{name:<36}{start.whole:>6.2f} s{start.whole - torch_seconds:>11.2f} s", end="")
    print("".join(f"{figure:>6.2f} s" for figure in figures), end="")
    print(f"{start.first:>10.2f} s{second}", flush=True)


if __name__ == "__main__":
    cli.run(main)

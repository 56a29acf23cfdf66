"""Many pictures from the shell: without Ray, and through Ray with one actor and more, in turn.

    python -m bench.many                          # two GPUs; random weights of the real shapes
    python -m bench.many --model_dir demo/checkpoint --pictures 640 --actors 0 1      # a CPU

Draws JPEGs of 640 x 480, has run.py caption them, each time as a process of its own, behind a short
run that fills the caches; prints of each when its first answer was there, counted from the command, and
pictures/s in the middle of the run, and compares the files byte for byte.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from blip2 import cli

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 256  # pictures


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        begun = time.perf_counter()
        pictures = directory / "pictures"
        with ProcessPoolExecutor() as pool:
            list(pool.map(functools.partial(draw, pictures), range(args.pictures), chunksize=50))
        print(f"{args.pictures} pictures drawn in {time.perf_counter() - begun:.0f} s", flush=True)
        model = args.model_dir or random_model(directory / "model")
        run(args, model, sorted(pictures.iterdir())[0], directory / "warm-up.jsonl", None)
        rates, outputs = [], []
        for number, actors in enumerate(args.actors):
            outputs.append(directory / f"{number}.jsonl")
            rates.append(run(args, model, pictures, outputs[-1], actors))
            if rates[0] and rates[-1] and len(rates) > 1:
                print(f"  {rates[-1] / rates[0]:.3f}x of the first", flush=True)
        contents = {output.read_bytes() if output.exists() else b"" for output in outputs}
    same = len(contents) == 1 and contents.pop().count(b"\n") == args.pictures
    print("the files are the same, byte for byte" if same else "THE FILES DIFFER")
    return 0 if same and all(rates) else 1


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Time run.py --output with Ray and without.")
    parser.add_argument(
        "--model_dir", type=Path, help="BLIP-2 checkpoint (default: random weights, for a GPU)"
    )
    parser.add_argument("--pictures", type=cli.positive_int, default=16000)
    parser.add_argument(
        "--actors",
        type=cli.non_negative_int,
        nargs="+",
        default=[0, 1, 2],
        help="copies of the engines on Ray, run by run; 0 is without Ray",
    )
    parser.add_argument("--workers", type=cli.positive_int, help="that decode, for each copy")
    parser.add_argument("--max_output_len", type=cli.positive_int, default=20)
    parser.add_argument("--timeout", type=cli.positive_int, default=150, help="seconds of a run")
    return parser.parse_args()


def draw(directory: Path, number: int) -> None:
    """A JPEG of soft noise, as hard to decode as a photo; in folders of 1000, the first of WARM_UP."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    folder = directory / ("000" if number < WARM_UP else f"{1 + number // 1000:03}")
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{number:06}.jpg", quality=90)


def random_model(directory: Path) -> Path:
    """BLIP-2 OPT-2.7B with random weights."""
    from bench.startup import random_checkpoint

    begun = time.perf_counter()
    random_checkpoint(directory)
    print(f"model made in {time.perf_counter() - begun:.0f} s", flush=True)
    return directory


def run(
    args: argparse.Namespace, model: Path, pictures: Path, output: Path, actors: int | None
) -> float:
    """Pictures a second in the middle of a run of run.py; 0 if it failed."""
    names = {None: "warm-up", 0: "without Ray", 1: "Ray, 1 actor"}
    name = names.get(actors, f"Ray, {actors} actors")
    command: list[object] = [sys.executable, ROOT / "run.py", "--no_verify"]
    command += ["--engine_dir", model, "--opt_engine_dir", model, "--input_dir", pictures]
    command += ["--output", output, "--max_output_len", args.max_output_len]
    command += ["--workers", args.workers] if args.workers else []
    command += ["--ray", "--ray_actors", actors] if actors else []
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=args.timeout,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        code, output_bytes = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output_bytes = None, error.stdout or b""
    printed = output_bytes.decode(errors="replace")
    whole = time.perf_counter() - begun
    first = found(printed, r"first answer after ([\d.]+) s")
    rate = found(printed, r"([\d.]+) pictures/s in the middle")
    print(
        f"{name:<14} first answer after {first:>6.1f} s, {rate:>7.1f} pictures/s in the middle,"
        f" {whole:>6.1f} s in all{'' if code == 0 else f', exit code {code}'}"
    )
    # The progress bar's states are lines too.
    lines = [line for line in printed.splitlines() if "it/s" not in line and "%|" not in line]
    print(*(f"    {line}" for line in lines[-16:] if line.strip()), sep="\n", flush=True)
    return rate if code == 0 else 0.0


def found(text: str, pattern: str) -> float:
    """The number in a text; 0 if there is none."""
    match = re.search(pattern, text)
    return float(match[1]) if match else 0.0


if __name__ == "__main__":
    cli.run(main)

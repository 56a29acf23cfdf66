"""Train the demo checkpoint from nothing, on one GPU, in one command.

    python -m demo.train --minutes 8.5                                 # into demo/out/checkpoint
    python -m demo.train --minutes 1                                   # tries it out, without a GPU too

Scenes are drawn by the other CPU cores before and during the training; the learning rate follows
the clock, so the training ends when it was told to. Then the saved checkpoint is judged on scenes
it has not seen, and the table is printed and written to metrics.json beside the weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file rather than with -m
    sys.path.insert(0, str(ROOT))

from blip2 import cli  # noqa: E402
from blip2.errors import Blip2Error  # noqa: E402
from demo.examples import (  # noqa: E402
    Batch,
    build_tokenizer,
    start_worker,
    worker_evaluation_batch,
    worker_training_batch,
)
from demo.scenes import EVALUATION_SEED  # noqa: E402

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

CHUNK = 128  # scenes a rendering process delivers at a time


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.ArgumentParser("Train the demo checkpoint from nothing, on one GPU.")
    add, whole = parser.add_argument, cli.positive_int
    out = ROOT / "demo" / "out" / "checkpoint"  # demo/checkpoint is the one in the repository
    add("--output_dir", type=Path, default=out, help="the checkpoint")
    add("--init_from", type=Path, help="a checkpoint to go on from, with its tokenizer")
    add("--evaluate_only", action="store_true", help="only judge what --output_dir holds")
    add("--minutes", type=cli.positive_float, default=8.5, help="from the start to the last step")
    add("--scenes", type=whole, default=500_000, help="pictures to draw at most")
    add("--first_scenes", type=whole, default=30_000, help="drawn before the second step")
    add("--evaluation_scenes", type=whole, help="unseen ones to be judged by (default: 4000; 100)")
    add("--images_per_step", type=whole, help="each with eight texts (default: 256; 8)")
    add("--learning_rate", type=cli.positive_float, default=1e-3, help="at its highest")
    add("--workers", type=whole, default=max(1, (os.cpu_count() or 2) - 2), help="that draw")
    add("--no_compile", action="store_true", help="train without torch.compile, as without a GPU")
    return parser.parse_args()


def with_defaults(arguments: argparse.Namespace, on_gpu: bool) -> argparse.Namespace:
    """The arguments, with what a GPU or a CPU can do in the time where nothing was given."""
    defaults = {"evaluation_scenes": 4000, "images_per_step": 256}
    if not on_gpu:
        defaults = {"evaluation_scenes": 100, "images_per_step": 8}
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    no_compile = arguments.no_compile or not on_gpu
    return argparse.Namespace(**{**vars(arguments), **defaults, **given, "no_compile": no_compile})


def chunks(first_seed: int, count: int) -> list[range]:
    """The seeds first_seed ... first_seed + count - 1 in ranges of at most CHUNK."""
    stop = first_seed + count
    return [range(seed, min(seed + CHUNK, stop)) for seed in range(first_seed, stop, CHUNK)]


def print_table(table: dict[str, dict[str, float]]) -> None:
    """One line a form: how many, and percent exact at each precision."""
    rows = [("form", table["caption"]), *((form, row.values()) for form, row in table.items())]
    for form, cells in rows:
        print(f"{form:<12}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


def open_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    """The tokenizer of the checkpoint to judge or to go on from, else a new one."""
    source = arguments.output_dir if arguments.evaluate_only else arguments.init_from
    if source is None:
        return build_tokenizer()
    if not (source / "tokenizer.json").is_file():
        raise Blip2Error(
            f"{source} holds no tokenizer.json", "name a directory that train.py wrote"
        )
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(source / "tokenizer.json"))


def main() -> None:
    """Draw, train, save, judge."""
    arguments = parse_arguments()
    begun = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes below are forked
    tokenizer = open_tokenizer(arguments)
    context = multiprocessing.get_context("fork")  # before torch: a child must not hold a GPU
    with context.Pool(arguments.workers, start_worker, (tokenizer.to_str(),)) as pool:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        arguments = with_defaults(arguments, device.type == "cuda")
        unseen = pool.map_async(
            worker_evaluation_batch, chunks(EVALUATION_SEED, arguments.evaluation_scenes), 1
        )
        if not arguments.evaluate_only:
            drawn = pool.imap_unordered(worker_training_batch, chunks(0, arguments.scenes))
            train(arguments, tokenizer, drawn, begun, device)

        from demo.training import evaluate

        table = evaluate(arguments.output_dir, unseen.get(), device)
    print_table(table)
    metrics = {"scenes": arguments.evaluation_scenes, "first_seed": EVALUATION_SEED, "exact": table}
    (arguments.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{time.monotonic() - begun:.0f} s in all", flush=True)


def train(
    arguments: argparse.Namespace,
    tokenizer: Tokenizer,
    drawn: Iterable[Batch],
    begun: float,
    device: torch.device,
) -> None:
    """Train on the pictures of `drawn` until the time is up; save now and then, and at the end."""
    import torch

    from demo import training
    from demo.model import build_config, build_model, open_model, save

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if arguments.init_from:
        model = open_model(arguments.init_from).to(device)
    else:
        model = build_model(build_config(tokenizer)).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters on {device}; {time.monotonic() - begun:.0f} s", flush=True)
    pictures = training.Pictures(arguments.scenes, device)
    pictures.fill_from(drawn)
    pictures.wait_for(1)
    schedule = training.Schedule(
        begun + 60 * arguments.minutes,
        min(arguments.first_scenes, arguments.scenes),
        arguments.images_per_step,
        arguments.learning_rate,
    )
    saved = time.monotonic()
    for line in training.train(model, pictures, schedule, not arguments.no_compile):
        print(" ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
        if time.monotonic() - saved > training.SAVE_SECONDS:
            save(model, tokenizer, arguments.output_dir)
            saved = time.monotonic()
    save(model, tokenizer, arguments.output_dir)
    print(f"trained and saved; {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main)

"""BLIP-2's stages on this machine's CPU, against transformers in the same run.

    python -m bench.cpu opt                      # decoding steps: 11 GB, some minutes
    python -m bench.cpu opt --layers 8           # a quarter of the layers, for a quarter of both
    python -m bench.cpu vit                      # ViT-g and the Q-Former: 9 GB
    python -m bench.cpu demo                     # answers of the demo model, as `make demo` left it

Random weights of BLIP-2 OPT-2.7B's shapes. Prints the CPU's instructions; milliseconds; the
bandwidth at which a step reads the weights and its share of what a plain sum over memory reaches in
the same run (for the ViT and the Q-Former: arithmetic, and its share of what a large matrix product
in the same precision reaches); and how many times as fast as transformers in float32 and in bfloat16
that is.
"""

from __future__ import annotations

import argparse
import functools
import gc
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not with -m

import torch

from bench.cpu_limits import Run, median_seconds, memory_bandwidth, product_rate
from bench.cpu_opt import NATIVE, native_step, transformers_step
from bench.cpu_vision import EXPORTS, QFormerStage, VitStage, computed_in
from bench.cpu_work import Work
from blip2 import cli, cpu, onnx_sessions
from blip2.checkpoints import QFormerConfig, VisionConfig
from blip2.engines import Places
from blip2.errors import Blip2Error
from blip2.pipeline import Pipeline, open_pipeline

REFERENCES = ("transformers float32", "transformers bfloat16")
DEMO = Path(__file__).resolve().parent.parent / "demo"
DEMO_TEXTS = ("", "Question: What colour is the circle? Answer:")


class Table:
    """Times each work at each number of rows and prints a line for it."""

    def __init__(self, title: str, unit: str, args: argparse.Namespace) -> None:
        self._args = args
        self._times: dict[tuple[str, int], float] = {}
        print(f"\n{title}")
        print(f"{'':<24}{'rows':>5}{'ms':>10}{unit:>9}{'share':>7}{'float32':>9}{'bfloat16':>9}")

    def add(self, name: str, make: Callable[[], Work], limit: float) -> None:
        """`make` is called here, so that only one model is in memory at a time."""
        work = make()
        for rows in self._args.rows:
            seconds = median_seconds(work.start(rows), self._args.repeats)
            self._times[name, rows] = seconds
            rate = work.cost(rows) / seconds
            ratios = (self._times.get((other, rows), 0) / seconds for other in REFERENCES)
            print(
                f"{name:<24}{rows:>5}{seconds * 1e3:>10.1f}{rate / 1e9:>9.1f}{rate / limit:>7.0%}",
                *(f"{ratio:>8.2f}x" if ratio else f"{'':>9}" for ratio in ratios),
                sep="",
                flush=True,
            )
        del work
        gc.collect()


def main() -> None:
    parser = cli.ArgumentParser("Time BLIP-2's stages on a CPU against transformers.")
    parser.add_argument("stage", choices=STAGES, help="what to time")
    parser.add_argument(
        "--layers", type=cli.positive_int, default=39, help="at most so many a model"
    )
    parser.add_argument("--repeats", type=cli.positive_int, default=5, help="to take the median of")
    parser.add_argument("--rows", type=cli.positive_int, nargs="+", help="steps' rows, or pictures")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="lines with one of these in the name",
    )
    args = parser.parse_args()
    onnx_sessions.own_process()
    cpu.limit_threads()
    print(f"{cpu.model_name()}, {torch.get_num_threads()} threads")
    STAGES[args.stage](args)


def opt(args: argparse.Namespace) -> None:
    """Decoding steps of one prompt's rows: beams, or requests."""
    args.rows = args.rows or [1, 5, 8, 40]  # 8 requests of 5 beams
    layers, bandwidth = min(args.layers, 32), memory_bandwidth()
    print(f"memory: {bandwidth / 1e9:.1f} GB/s")
    table = Table(f"OPT-2.7B, {layers} layers, a step", "GB/s", args)
    for name in REFERENCES:
        if chosen(name, args):
            make = functools.partial(transformers_step, layers, getattr(torch, name.split()[1]))
            table.add(name, make, bandwidth)
    for name, precision in NATIVE.items():
        if chosen(name, args):
            table.add(name, functools.partial(native_step, layers, *precision), bandwidth)


def vit(args: argparse.Namespace) -> None:
    """Both stages before OPT, for one picture and for several."""
    args.rows = args.rows or [1, 4]
    limits = {}
    for precision in ("float32", "bfloat16", "int8"):
        limits[precision] = product_rate(precision)
        print(f"{precision}: {limits[precision] / 1e9:.0f} G/s", flush=True)
    vision = VisionConfig(num_hidden_layers=min(args.layers, 39))
    qformer = QFormerConfig(num_hidden_layers=min(args.layers, 12))
    for title, stage in (
        (f"ViT-g, {vision.num_hidden_layers} layers", VitStage(vision)),
        (f"Q-Former, {qformer.num_hidden_layers} layers", QFormerStage(qformer)),
    ):
        table = Table(title, "G/s", args)
        for name in REFERENCES:
            dtype = name.split()[1]
            if chosen(name, args):
                make = functools.partial(stage.transformers, getattr(torch, dtype))
                table.add(name, make, limits[dtype])
        for name, (dtype, opset) in EXPORTS.items():
            if chosen(name, args) and dtype in stage.dtypes:
                make = functools.partial(stage.ours, dtype, opset)
                table.add(name, make, limits[computed_in(dtype)])


def demo(args: argparse.Namespace) -> None:
    """Milliseconds from a picture to an answer of the demo model."""
    import transformers

    from blip2.images import load_image, pixel_values
    from blip2.language import GenerationOptions

    out = DEMO / "out"
    if not (out / "opt" / "fp16").exists():
        command = shlex.join(["make", "-C", str(DEMO.parent), "demo"])
        raise Blip2Error(f"{out} holds no engines", f"make them with: {command}")
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(DEMO / "checkpoint").eval()

    def reference(pipeline: Pipeline, pixels: torch.Tensor, text: str) -> Run:
        tokens = [model.config.image_token_id] * pipeline.vision.num_query_tokens
        ids = torch.tensor([[*tokens, 2, *pipeline.tokenizer.encode(text)]])
        return torch.inference_mode()(
            lambda: model.generate(
                pixel_values=pixels,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=pipeline.tokenizer.end_id,
            )
        )

    def ours(pipeline: Pipeline, pixels: torch.Tensor, text: str) -> Run:
        end_id, pad_id = pipeline.tokenizer.end_id, pipeline.tokenizer.pad_id
        options = GenerationOptions(end_id=end_id, pad_id=pad_id, max_output_len=40)
        return lambda: pipeline.answer(pixels, [text], options)

    print(f"{'demo':<22}", *(f"{text or '(caption)':>46}" for text in DEMO_TEXTS), sep="")
    first: list[float] = []
    engines = [(f"ours, {name}", name, ours) for name in ("fp16", "int8", "int4")]
    for name, opt_directory, make in [("transformers float32", "fp16", reference), *engines]:
        if not (out / "opt" / opt_directory).exists():
            continue
        pipeline = open_pipeline(
            Places.of(out / "onnx", out / "opt" / opt_directory, out / "query_tokens.pt")
        )
        picture = load_image(DEMO / "scene.png")
        pixels = pixel_values(picture, pipeline.vision.preprocessing)[None]
        seconds = [
            median_seconds(make(pipeline, pixels, text), args.repeats) for text in DEMO_TEXTS
        ]
        first = first or seconds
        pairs = zip(first, seconds, strict=True)
        cells = (f"{time * 1e3:>35.1f} ms {before / time:>6.2f}x" for before, time in pairs)
        print(f"{name:<22}", *cells, sep="", flush=True)


STAGES = {"opt": opt, "vit": vit, "demo": demo}


def chosen(name: str, args: argparse.Namespace) -> bool:
    return any(word in name for word in args.only)


if __name__ == "__main__":
    cli.run(main)

"""Build TensorRT plans of the ViT (0) and the Q-Former (1) from onnx_export.py's files.

    python build_vit_qformer.py 0
    python build_vit_qformer.py 1
    python build_vit_qformer.py all --max_batch_size 16
    python build_vit_qformer.py all --compute_capability 8.9 12.0     # TensorRT-RTX, needs no GPU

Writes, under --plan_dir, each with a .json beside it:
    visual_encoder/visual_encoder_fp16.plan   Qformer/Qformer_fp16.plan
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from blip2 import cli

if TYPE_CHECKING:
    from blip2.vision.tensorrt_plans import PlanFacts


batch_size = cli.int_between(1, 1 << 16)


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Build TensorRT plans of BLIP-2's ViT and Q-Former.")
    add = parser.add_argument
    add("network", choices=("0", "1", "all"), help="0: the ViT, 1: the Q-Former")
    add("--onnx_dir", default="onnx", help="written by onnx_export.py")
    add("--plan_dir", default="plan", help="where the plans go")
    add("--min_batch_size", type=batch_size, default=1, help="smallest batch to build for")
    add("--opt_batch_size", type=batch_size, default=4, help="batch to tune for")
    add(
        "--max_batch_size",
        type=batch_size,
        default=8,
        help="largest batch; run.py splits larger ones",
    )
    add("--workspace_gb", type=cli.number_up_to(1 << 20), help="limit of the builder's GPU memory")
    add("--timing_cache", help="file to keep measured kernels in; makes the next build faster")
    add(
        "--compute_capability",
        nargs="+",
        type=compute_capability,
        default=[],
        metavar="X.Y",
        help="GPUs to build for without having one, e.g. 8.9 12.0 (TensorRT-RTX only)",
    )
    add("--no_verify", action="store_true", help="do not compare large files with their hashes")
    add("--verbose", action="store_true", help="print everything TensorRT says")
    args = parser.parse_args()
    if not args.min_batch_size <= args.opt_batch_size <= args.max_batch_size:
        parser.error(
            f"--min_batch_size {args.min_batch_size}, --opt_batch_size {args.opt_batch_size} and"
            f" --max_batch_size {args.max_batch_size} must not decrease"
        )
    return args


def compute_capability(text: str) -> str:
    """argparse type: a compute capability such as 8.9."""
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.9")
    return text


def main() -> None:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help waits for neither torch nor TensorRT.
    from blip2 import artifacts
    from blip2.vision import tensorrt_build, tensorrt_plans

    # Only RTX builds for GPUs that are not here, so asking for that asks for RTX.
    flavours = (tensorrt_plans.STANDARD, tensorrt_plans.RTX)
    trt = tensorrt_plans.import_tensorrt(*(flavours[::-1] if args.compute_capability else flavours))
    tensorrt_plans.log_of(trt).verbose = args.verbose
    options = tensorrt_build.BuildOptions(
        batch_sizes=(args.min_batch_size, args.opt_batch_size, args.max_batch_size),
        workspace_gb=args.workspace_gb,
        timing_cache=Path(args.timing_cache) if args.timing_cache else None,
        compute_capabilities=args.compute_capability,
        verify=not args.no_verify,
    )
    stages = {"0": tensorrt_plans.VIT, "1": tensorrt_plans.QFORMER}
    if args.timing_cache:
        plans = [Path(args.plan_dir, stage.plan_file) for stage in stages.values()]
        artifacts.refuse_same(
            {"--timing_cache": options.timing_cache, **{str(plan): plan for plan in plans}},
            {"--onnx_dir": Path(args.onnx_dir).rglob("*")},
        )
    bar = ProgressBar("TensorRT")
    try:
        built = tensorrt_build.build_plans(
            trt,
            [stages[args.network]] if args.network in stages else list(stages.values()),
            Path(args.onnx_dir),
            Path(args.plan_dir),
            options,
            bar.show,
        )
    finally:
        bar.clear()
    for facts, seconds in built:
        print(summary(facts, seconds))


class ProgressBar:
    """One line on a terminal, redrawn when the percentage or the phase changes; else nothing."""

    def __init__(self, title: str, width: int = 30) -> None:
        self._title = title
        self._width = width
        self._visible = sys.stderr.isatty()
        self._shown = ""
        self._furthest = 0.0

    def show(self, fraction: float, phase: str) -> None:
        """Draw `fraction` (0 … 1) and what is being done. The bar never goes back."""
        self._furthest = max(self._furthest, fraction)
        filled = int(self._furthest * self._width)
        bar = "#" * filled + "." * (self._width - filled)
        line = f"{self._title} [{bar}] {self._furthest:4.0%} {phase[:40]}"
        if self._visible and line != self._shown:
            self._shown = line
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the line, so that the next print starts at the margin."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def summary(facts: PlanFacts, seconds: float) -> str:
    """The plan's size, build time and targets, then one line a tensor with its profile."""
    low, typical, high = facts.profile
    lines = [
        f"{facts.path}: {facts.sidecar['size'] / 1e6:.1f} MB in {seconds:.1f} s, {facts.product},"
        f" compute capability {', '.join(facts.compute_capabilities)}"
    ]
    for side in ("inputs", "outputs"):
        for name in facts.sidecar[side]:
            shape = " x ".join(map(str, ("batch", *facts.shapes[name])))
            lines.append(f"  {side[:-1]:6} {name:12} {facts.dtypes[name]} {shape}")
    lines.append(f"  batch  {low} to {high}, tuned for {typical}")
    return "\n".join(lines)


def program() -> NoReturn:
    """Start it, and exit."""
    cli.run(main)

"""Convert OPT to TensorRT-LLM's checkpoint format, which run.py also runs as it is.

    python opt/convert_checkpoint.py --model_dir Salesforce/blip2-opt-2.7b --dtype float16 \\
        --output_dir ./opt/2.7B/trt_ckpt/fp16/1-gpu/
    python opt/convert_checkpoint.py --weight_only_precision int4
    python opt/convert_checkpoint.py --quantization fp8

--model_dir is a BLIP-2, whose language model is taken, or an OPT alone: use the BLIP-2 that the
ViT and the Q-Former are from, as its vocabulary can differ from that of facebook/opt-2.7b.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import blip2
from blip2 import cli
from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from blip2.checkpoints import Checkpoint
    from blip2.language.trtllm_format import OPTCheckpointConfig

QUANT_ALGOS = {"int8": "W8A16", "int4": "W4A16"}
FLOAT8_ALGO = "FP8_PER_CHANNEL_PER_TOKEN"  # as in trtllm_format, which takes torch
PRECISION_NAMES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "W8A16": "int8_weightonly",
    "W4A16": "int4_weightonly",
    FLOAT8_ALGO: "fp8",
}
# (layers, hidden size) of the published models: names the default output directory.
MODEL_SIZES = {
    (12, 768): "125M",
    (24, 1024): "350M",
    (24, 2048): "1.3B",
    (32, 2560): "2.7B",
    (32, 4096): "6.7B",
    (40, 5120): "13B",
    (48, 7168): "30B",
    (64, 9216): "66B",
}


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model_dir",
        default="Salesforce/blip2-opt-2.7b",
        help="BLIP-2 or OPT checkpoint: a directory or a Hugging Face id",
    )
    parser.add_argument("--dtype", choices=("float16", "float32", "bfloat16"), default="float16")
    parser.add_argument(
        "--output_dir",
        help="where config.json and the ranks' files go; by default"
        " opt/<size>/trt_ckpt/<precision>/<tp_size>-gpu",
    )
    parser.add_argument(
        "--use_weight_only",
        action="store_true",
        help="have the linear layers quantised when the checkpoint is built or run",
    )
    parser.add_argument(
        "--weight_only_precision",
        choices=tuple(QUANT_ALGOS),
        help="what --use_weight_only means, which this implies (default: int8)",
    )
    parser.add_argument(
        "--quantization",
        choices=("fp8",),
        help="quantise the linear layers now: fp8, for NVIDIA GPUs that have it (Ada and later), makes"
        " weights E4M3 by channel, to be multiplied with inputs in E4M3 by token",
    )
    parser.add_argument("--tp_size", type=cli.positive_int, default=1, help="GPUs to split over")
    parser.add_argument(
        "--use_parallel_embedding",
        action="store_true",
        help="split the embeddings over the GPUs too",
    )
    parser.add_argument(
        "--embedding_sharding_dim",
        type=int,
        choices=(0, 1),
        default=0,
        help="split them by vocabulary (0) or by width (1)",
    )
    parser.add_argument(
        "--workers", type=cli.positive_int, default=1, help="tensors to convert at the same time"
    )
    parser.add_argument(
        "--trtllm_version",
        default="1.2.1",
        help="TensorRT-LLM that the printed trtllm-build command is for, 0.9 to 1.2.1",
    )
    args = parser.parse_args()
    if args.quantization and (args.use_weight_only or args.weight_only_precision):
        parser.error("--quantization and --use_weight_only are two precisions: leave one out")
    if args.use_weight_only and args.weight_only_precision is None:
        args.weight_only_precision = "int8"
    return args


def main() -> None:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help does not wait for torch.
    from blip2.checkpoints import open_checkpoint
    from blip2.language.conversion import ConversionOptions, convert, target_config
    from blip2.language.trtllm_build import parse_version

    parse_version(args.trtllm_version)
    start = time.perf_counter()
    checkpoint = open_checkpoint(args.model_dir)
    options = ConversionOptions(
        dtype=args.dtype,
        quant_algo=FLOAT8_ALGO
        if args.quantization
        else QUANT_ALGOS.get(args.weight_only_precision),
        tp_size=args.tp_size,
        use_parallel_embedding=args.use_parallel_embedding,
        embedding_sharding_dim=args.embedding_sharding_dim,
    )
    config = target_config(checkpoint, options)
    output_dir = Path(args.output_dir or default_output_dir(config))
    errors = convert(checkpoint, config, output_dir, args.workers)

    size = sum(file.stat().st_size for file in output_dir.glob("rank*.safetensors"))
    print(
        f"{output_dir}: {describe(config)} of {args.model_dir}, {config.tp_size} file(s),"
        f" {size / 1e9:.2f} GB, {time.perf_counter() - start:.1f} s"
    )
    if errors:
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        print(f"FP8 changes the weights by {mean:.1%}, the most by {errors[worst]:.1%} ({worst})")
    print_next_steps(output_dir, config, checkpoint, args.model_dir, args.trtllm_version)


def default_output_dir(config: OPTCheckpointConfig) -> Path:
    """The guide's directory for a model of this size, precision and number of GPUs."""
    size = MODEL_SIZES.get((config.num_hidden_layers, config.hidden_size))
    if size is None:
        raise Blip2Error(
            "this OPT is of no published size", "say where to write it with --output_dir"
        )
    return Path("opt", size, "trt_ckpt", precision_name(config), f"{config.tp_size}-gpu")


def precision_name(config: OPTCheckpointConfig) -> str:
    """The precision as the guide's directories name it."""
    return PRECISION_NAMES[config.quant_algo or config.dtype]


def describe(config: OPTCheckpointConfig) -> str:
    """The stored type, and what becomes of it."""
    if config.quant_algo is None:
        return f"{config.dtype} OPT"
    done = "with linears" if config.is_float8 else "to run"
    return f"{config.dtype} OPT ({done} as {config.quant_algo})"


def print_next_steps(
    output_dir: Path,
    config: OPTCheckpointConfig,
    checkpoint: Checkpoint,
    model_dir: str,
    trtllm_version: str,
) -> None:
    """Print the commands that run the checkpoint, as it is and as a TensorRT-LLM engine."""
    from blip2.language.trtllm_build import EngineLimits, build_command, query_tokens, runs_here

    # The ViT and the Q-Former of the same checkpoint; an OPT alone has none, LAVIS's file is exported.
    runs = checkpoint.kind != "opt" and not Path(model_dir).is_file()
    seen = ("--engine_dir", model_dir) if runs else ()
    scene = Path(blip2.__file__).resolve().parent.parent / "demo" / "scene.png"
    picture = scene if scene.is_file() else "photo.jpg"  # pip installs no demo
    asked = ("--input_dir", picture, "--input_text", "")
    if config.tp_size == 1:
        run = cli.command("run.py", *seen, "--opt_engine_dir", output_dir, *asked)
        beside = "" if seen else ", beside what onnx_export.py has written here"
        print(f"\nRun it as it is{beside}:\n  {run}")
    if config.is_float8:
        print("\nTensorRT-LLM builds no engine of it: its OPT wants LayerNorms in 16 bits.")
        return
    name = MODEL_SIZES.get((config.num_hidden_layers, config.hidden_size), "custom").lower()
    engine_dir = f"trt_engine/blip-2-opt-{name}/{precision_name(config)}/{config.tp_size}-gpu"
    num_query_tokens = query_tokens(checkpoint)
    limits = EngineLimits.within(config.max_position_embeddings)
    command = build_command(
        output_dir, engine_dir, config, num_query_tokens, trtllm_version, limits
    )
    mpirun = "" if config.tp_size == 1 else f"mpirun -n {config.tp_size} "
    print(
        f"\nOr build an engine with TensorRT-LLM {trtllm_version}, whose prompt table has"
        f" {num_query_tokens} query tokens x {limits.max_batch_size} requests:\n  {command}"
    )
    if runs_here(trtllm_version):
        run = cli.command("run.py", *seen, "--opt_engine_dir", engine_dir, *asked)
        print(f"and run that:\n  {mpirun}{run}")
    else:
        print("run.py cannot run that one: it takes engines of 0.13 to 1.2.1.")


def program() -> NoReturn:
    """Start it, and exit."""
    cli.run(main)

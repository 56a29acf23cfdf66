"""The flags of run.py, and which of them go together."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from blip2 import cli
from blip2.templates import TEMPLATE

STANDARD_OUTPUT = "-"
FLAGS = ("empty", "loop", "length")
DEFAULT_TEXT = "Question: which city is this? Answer:"
# What is for engines of this process, not for a server's.
ENGINE_FLAGS = (
    *(
        "engine_dir",
        "opt_engine_dir",
        "query_tokens",
        "hf_model_location",
        "no_verify",
        "benchmark",
    ),
    *("batch_size", "ray", "html", "retry_errors"),
    *("min_output_len", "stop", "num_return_sequences", "prefix"),
    *("decode", "shards", "shard_size", "overwrite", "min_score", "reject"),
)
OTHER_FORMS = (".csv", ".parquet", ".tar", "/")  # of output than JSON lines
SAMPLING = ("top_k", "top_p", "temperature")


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Ask BLIP-2 a question about a picture.")
    add = parser.add_argument
    add(
        "--input_text",
        action="append",
        help=f"question; empty: caption (default: {DEFAULT_TEXT!r}; with --output: a caption, and"
        " may be given several times)",
    )
    add(
        "--prompt_template",
        type=template,
        metavar="TEMPLATE",
        default=TEMPLATE,
        help="replace the {} in it by each text that has not its form yet; '{}': the text as it is",
    )
    add("--prefix", metavar="TEXT", default="", help="how every answer begins: 'a photo of'")
    add("--keep_prefix", action="store_true", help="print it with the answers")
    add(
        "--input_dir",
        nargs="+",
        type=source,
        metavar="PICTURE",
        help="image.pt, or a picture: file or URL (default: image.pt); with --output any number of"
        " pictures, folders, 'patterns*', lists.txt, shards.tar, 'shards-{000..009}.tar'",
    )
    add(
        "--output",
        metavar="FILE",
        help="a line for each picture and question: FILE.jsonl, .csv or .parquet; .tar: shards for"
        " webdataset; FOLDER/: a .txt for each picture; -: print them, without going on later",
    )
    add(
        "--shards",
        type=parts,
        metavar="A..B/N",
        help="with --output: of the pictures and shards, cut in N parts, parts A to B: 0..9/100, 3/100",
    )
    add(
        "--shard_size",
        type=cli.positive_int,
        help="with --output FILE.tar: pictures (default: 1000)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="with --output FOLDER/: write over a .txt that is there",
    )
    add(
        "--min_score",
        type=cli.finite_float,
        help="with --output FILE: lines of a lower score go to FILE.rejected.jsonl",
    )
    add(
        "--reject",
        nargs="+",
        choices=FLAGS,
        metavar="FLAG",
        help="with --output FILE: so do those with one of these flags: empty, loop, length",
    )
    add(
        "--retry_errors",
        action="store_true",
        help="with --output FILE: ask again about pictures of which there is an error in it",
    )
    add("--html", type=Path, metavar="FILE.html", help="with --output: a page to look through")
    add(
        "--batch_size",
        type=cli.int_between(1, 4096),
        help="with --output (default: by the engines)",
    )
    add(
        "--workers",
        type=cli.int_between(1, 256),
        help="with --output: processes that decode pictures (default: half of the processors; with"
        " --ray: of each actor); with --server: pictures asked about at once (default: 32)",
    )
    add(
        "--decode",
        choices=("exact", "fast"),
        help="with --output: fast decodes large JPEGs at a smaller scale, at least twice what the ViT"
        " takes (default: exact)",
    )
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="with --output: all GPUs of a Ray cluster; without an address, of this machine",
    )
    add(
        "--ray_actors",
        type=cli.positive_int,
        metavar="N",
        help="with --ray: copies of the engines (default: one a GPU, or without any one a machine)",
    )
    add(
        "--server",
        metavar="URL",
        help="ask a server that serve.py started, instead of opening engines; its key is that of"
        " $BLIP2_API_KEY",
    )
    add(
        "--query_tokens",
        help="saved by onnx_export.py (default: query_tokens.pt in or beside --engine_dir)",
    )
    add(
        "--engine_dir",
        help="ViT and Q-Former: a directory, with them or with plan/ or onnx/ in it, or a BLIP-2's hub"
        " id (default: plan, else onnx)",
    )
    add(
        "--opt_engine_dir",
        help="OPT: a directory or a hub id (default: trt_engine/blip-2-opt-2.7b/fp16/1-gpu, else"
        " opt/2.7B/trt_ckpt/fp16/1-gpu)",
    )
    add(
        "--hf_model_location",
        help="tokenizer: directory or hub id (default: the checkpoint's, or by the query tokens)",
    )
    add("--max_txt_len", type=cli.positive_int, default=32, help="longest prompt, in tokens")
    add("--max_output_len", type=cli.positive_int, default=30, help="longest answer, in tokens")
    add("--min_output_len", type=cli.non_negative_int, default=0, help="shortest answer, in tokens")
    add("--stop", action="append", metavar="TEXT", help="answers end behind it; several times")
    add("--num_beams", type=cli.positive_int, default=1, help="beam search if above 1")
    add(
        "--num_return_sequences",
        type=cli.positive_int,
        metavar="N",
        help="answers to each question: draws, or the best beams (default: 1, or all beams)",
    )
    add("--length_penalty", type=cli.finite_float, default=1.0, help="above 1: longer beams win")
    add("--repetition_penalty", type=cli.positive_float, default=1.0, help="above 1: fewer repeats")
    add(
        "--top_k",
        type=cli.non_negative_int,
        help="sample among k; 0: all",
    )
    add(
        "--top_p",
        type=cli.number_up_to(1),
        help="sample among probability p",
    )
    add("--temperature", type=cli.positive_float, help="sample: flatten")
    add("--seed", type=cli.int_between(0, 2**63 - 1), default=0, help="of the sampling")
    add("--no_verify", action="store_true", help="do not compare large files with their hashes")
    add("--benchmark", type=cli.positive_int, metavar="N", help="repeat N times, print medians")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    many, printed = args.output is not None, args.output == STANDARD_OUTPUT
    routed = {"--min_score": args.min_score, "--reject": args.reject}
    for flag, value in {
        **routed,
        "--decode": args.decode,
        "--shards": args.shards,
        "--shard_size": args.shard_size,
        "--overwrite": args.overwrite or None,
        "--html": args.html,
        "--batch_size": args.batch_size,
        "--workers": args.workers,
        "--ray": args.ray,
        "--retry_errors": args.retry_errors or None,
    }.items():
        if value is not None and not many:
            parser.error(f"{flag} goes with --output")
    if args.ray_actors and not args.ray:
        parser.error("--ray_actors goes with --ray")
    kept = {"--html": args.html, "--retry_errors": args.retry_errors or None, **routed}
    for flag, value in kept.items():
        if value is not None and printed:
            parser.error(f"{flag} needs --output FILE, which lines are read from")
    if args.keep_prefix and not args.prefix.strip():
        parser.error("--keep_prefix goes with --prefix")
    if many and (args.json or args.benchmark):
        parser.error("--output goes without --json and --benchmark")
    if many and not args.input_dir:
        parser.error("with --output give --input_dir the pictures")
    if not many and len(args.input_text or []) > 1:
        parser.error("several --input_text need --output")
    if not many and len(args.input_dir or []) > 1:
        parser.error("several pictures need --output")
    if args.server:
        for name in ENGINE_FLAGS:
            if getattr(args, name) not in (None, False, 0, ""):
                parser.error(f"--{name} goes without --server")
        if many and args.output.lower().endswith(OTHER_FORMS):
            parser.error("with --server --output is a FILE.jsonl")
        if not args.input_dir:
            parser.error("with --server give --input_dir the picture")
    args.input_text = args.input_text or ["" if many else DEFAULT_TEXT]
    return args


def source(text: str) -> str:
    """argparse type: a path without what makes no difference, "photos" for "./photos/"; or a URL."""
    return str(Path(text)) if text and "://" not in text else text


def parts(text: str) -> tuple[int, int, int]:
    """argparse type: "A..B/N", or "A/N": parts A to B of N, counted from 0."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?/(\d+)", text)
    first, last, count = (int(found[n] or found[1]) for n in (1, 2, 3)) if found else (0, 0, 0)
    if not first <= last < count:
        raise argparse.ArgumentTypeError(f"{text!r} are no parts A..B/N, counted from 0")
    return first, last, count


def template(text: str) -> str:
    """argparse type: a text with one {} in it."""
    if text.count("{}") != 1:
        raise argparse.ArgumentTypeError(f"{text!r} has not one {{}} for the text")
    return text

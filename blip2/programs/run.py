"""Ask BLIP-2 a question about a picture: ViT → Q-Former → OPT, on whatever engines are there.

    python run.py --input_text "Question: which city is this? Answer:"
    python run.py --input_dir photo.jpg --input_text ""              # no text: a caption
    python run.py --engine_dir onnx --opt_engine_dir opt/2.7B/trt_ckpt/int8_weightonly/1-gpu
    python run.py --input_dir photos/ --output captions.jsonl        # many pictures, resumable
    python run.py --input_dir photos/ --output captions.jsonl --ray  # on every GPU here
    python run.py --server http://127.0.0.1:8000 --input_dir photo.jpg     # asks serve.py
    mpirun -n 2 python run.py --opt_engine_dir trt_engine/blip-2-opt-2.7b/fp16/2-gpu

What --engine_dir and --opt_engine_dir hold decides what runs them: TensorRT plans, ONNX files or a
BLIP-2 checkpoint; a TensorRT-LLM engine, a TensorRT-LLM checkpoint or a BLIP-2 or OPT checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from blip2 import cli
from blip2.errors import Blip2Error
from blip2.templates import TEMPLATE

if TYPE_CHECKING:
    import torch

    from blip2.answers import Answer
    from blip2.engines import Places
    from blip2.language import GenerationOptions
    from blip2.many.cluster import Cluster
    from blip2.many.outputs import Target
    from blip2.pipeline import Pipeline


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


def main() -> int | None:
    args = parse_arguments()
    if args.server:
        return ask_server_of_many(args) if args.output else ask_server(args)
    if args.output:
        return answer_many(args)
    answer_one(args)
    return None


def answer_one(args: argparse.Namespace) -> None:
    """Print the answer about one picture, or those of one image.pt."""
    # Imported after the arguments are parsed, so that --help does not wait for torch.
    from blip2 import onnx_sessions
    from blip2.many import inputs
    from blip2.pipeline import Stopwatch, open_pipeline
    from blip2.prompts import check_length
    from blip2.templates import begin_answer, fill_template

    [text] = args.input_text
    prompt = begin_answer(fill_template(args.prompt_template, text), args.prefix)
    question, prefix = Asked(text, prompt), kept_prefix(args)
    places = places_of(args)
    [source] = args.input_dir or [places.picture]
    if inputs.is_collection(source):
        raise Blip2Error(f"{source} stands for several pictures", "add --output answers.jsonl")
    watch = Stopwatch({"start": cli.seconds_since_start()})
    onnx_sessions.own_process()
    with watch.time("load engines"):
        pipeline = open_pipeline(places, verify=not args.no_verify)
    with watch.time("load picture"):
        pixel_values = load_pictures(source, pipeline)
    options = pipeline.options(decoding_options(args))
    prompt_ids = pipeline.tokenizer.encode(question.prompt)
    check_length(question.prompt, prompt_ids, args.max_txt_len)

    texts = [question.prompt] * len(pixel_values)
    if args.benchmark:
        answers, times = benchmark(pipeline, pixel_values, texts, options, args.benchmark, prefix)
    else:
        answers = pipeline.answer(pixel_values, texts, options, watch, prefix)
        times = Times(watch.seconds, cli.seconds_since_start())

    if not pipeline.language.is_leader:
        return
    if args.json:
        print(json.dumps(as_json(question, answers, times)))
    else:
        print(as_text(question, answers, times))


def ask_server(args: argparse.Namespace) -> None:
    """Print a server's answer about one picture. Imports no torch."""
    from blip2.serving.client import Client, read_picture

    seconds = {"start": cli.seconds_since_start()}
    [text], [picture] = args.input_text, args.input_dir
    if picture.endswith(".pt"):
        raise Blip2Error(f"{picture} is a tensor", "give `input_dir` a picture")
    begun = time.perf_counter()
    content = read_picture(picture)
    seconds["load picture"] = time.perf_counter() - begun
    with Client(args.server) as client:
        answered = client.ask(content, text, server_options(args))
    question = Asked(text, answered.prompt)
    times = Times({**seconds, **answered.seconds}, cli.seconds_since_start())
    answers = [answered.answers]
    if args.json:
        print(json.dumps(as_json(question, answers, times)))
    else:
        print(as_text(question, answers, times))


def ask_server_of_many(args: argparse.Namespace) -> int:
    """As `answer_many`, of a server. Imports no torch."""
    from blip2.serving.many import REQUESTS, ServedJob

    printed = args.output == STANDARD_OUTPUT
    job = ServedJob(
        url=args.server,
        sources=args.input_dir,
        questions=args.input_text,
        options=server_options(args),
        output=None if printed else Path(args.output),
        requests=args.workers or REQUESTS,
    )
    begun = time.perf_counter()
    try:
        summary = job.run()
    except KeyboardInterrupt:
        if printed:
            raise
        raise KeyboardInterrupt("the same command goes on where this one stopped") from None
    rate = summary.new / (time.perf_counter() - begun)
    table = (
        f"{summary.done} pictures done, {summary.failed} of them failed; {summary.new} in this run,"
        f" {rate:.1f} pictures/s"
    )
    print(table, file=sys.stderr if printed else sys.stdout)
    return 1 if summary.failed else 0


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a server is told of how to decode."""
    more = {"prompt_template": args.prompt_template, "max_txt_len": args.max_txt_len}
    known = {n: value for n, value in decoding_options(args).items() if n not in ENGINE_FLAGS}
    return {**known, **more}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A text, and the prompt that OPT reads for it."""

    text: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds by stage, and those of the whole as the clock has them; medians of `repeats` runs."""

    stages: dict[str, float]
    total: float
    repeats: int | None = None


def benchmark(
    pipeline: Pipeline,
    pixel_values: torch.Tensor,
    texts: Sequence[str],
    options: GenerationOptions,
    repeats: int,
    prefix: str,
) -> tuple[list[list[Answer]], Times]:
    """The answers, and the medians of `repeats` runs behind one that warms up."""
    from blip2.pipeline import Stopwatch

    answers = pipeline.answer(pixel_values, texts, options, prefix=prefix)
    runs, totals = [Stopwatch() for _ in range(repeats)], []
    for run in runs:
        begun = time.perf_counter()
        answers = pipeline.answer(pixel_values, texts, options, run, prefix)
        totals.append(time.perf_counter() - begun)
    stages = {
        stage: statistics.median(run.seconds[stage] for run in runs) for stage in runs[0].seconds
    }
    return answers, Times(stages, statistics.median(totals), repeats)


def answer_many(args: argparse.Namespace) -> int:
    """Write a line for each picture and question; 1 if some picture could not be read, else 0."""
    with contextlib.ExitStack() as open_until_the_end:
        stages, cluster = {"start": cli.seconds_since_start()}, None
        if args.ray:
            from blip2.many.cluster import Cluster

            # Its processes import PyTorch while this one does.
            cluster = open_until_the_end.enter_context(
                Cluster(args.ray, args.ray_actors, args.workers)
            )
            stages["start Ray"] = cli.seconds_since_start() - stages["start"]
        return answer_on(cluster, args, stages)


def answer_on(cluster: Cluster | None, args: argparse.Namespace, stages: dict[str, float]) -> int:
    """As `answer_many`, on a cluster or here; `stages` are those before, in seconds."""
    from blip2 import onnx_sessions
    from blip2.many.batch import Question
    from blip2.many.job import Job
    from blip2.pipeline import Stopwatch
    from blip2.templates import begin_answer, fill_template

    stages["import"] = cli.seconds_since_start() - sum(stages.values())
    printed = args.output == STANDARD_OUTPUT
    questions = []
    for text in args.input_text:
        prompt = begin_answer(fill_template(args.prompt_template, text), args.prefix)
        questions.append(Question(text, prompt, kept_prefix(args)))
    job = Job(
        sources=args.input_dir,
        questions=questions,
        places=places_of(args),
        decoding=decoding_options(args),
        output=None if printed else target_of(args),
        part=args.shards,
        html=args.html,
        batch_size=args.batch_size,
        workers=args.workers,
        cluster=cluster,
        is_fast=args.decode == "fast",
        max_txt_len=args.max_txt_len,
        retry_errors=args.retry_errors,
        verify=not args.no_verify,
    )
    onnx_sessions.own_process()
    try:
        summary = job.run(Stopwatch(stages))
    except KeyboardInterrupt:
        if printed:
            raise
        raise KeyboardInterrupt("the same command goes on where this one stopped") from None
    table = summary.table(cli.seconds_since_start())
    print(table, file=sys.stderr if printed else sys.stdout)
    return 1 if summary.failed else 0


def target_of(args: argparse.Namespace) -> Target:
    """Where the answers go."""
    from blip2.many.outputs import Rule, Target

    return Target.of(
        args.output,
        rule=Rule(args.min_score, args.reject or ()),
        shard_size=args.shard_size or 1000,
        overwrite=args.overwrite,
    )


def places_of(args: argparse.Namespace) -> Places:
    """Where the engines are, and the tokenizer."""
    from blip2.engines import Places

    return Places.of(
        args.engine_dir, args.opt_engine_dir, args.query_tokens, args.hf_model_location
    )


def load_pictures(source: str, pipeline: Pipeline) -> torch.Tensor:
    """image.pt as saved by the export, or the pixels of one picture: B x 3 x S x S for the ViT."""
    import torch

    from blip2 import images

    if source.endswith(".pt"):
        return load_saved_picture(Path(source))
    picture = images.load_image(source)
    pixels = images.resized_pixels(picture, pipeline.vision.preprocessing)
    return torch.from_numpy(pixels)[None]


def load_saved_picture(path: Path) -> torch.Tensor:
    """image.pt; compared with its description where it has one, as those of the export do.

    Raises:
        Blip2Error: missing, damaged, or anything but a tensor.
    """
    from blip2 import artifacts

    made_by = "python onnx_export.py --image PICTURE"
    verification = artifacts.Verification({path: made_by})
    pixel_values = artifacts.load_tensor(path, made_by)
    verification.finish()
    return pixel_values


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """For `Pipeline.options`."""
    lengths = ("max_output_len", "min_output_len", "stop")
    search = ("num_beams", "num_return_sequences", "length_penalty", "repetition_penalty")
    return {name: getattr(args, name) for name in (*lengths, *search, *SAMPLING, "seed")}


def kept_prefix(args: argparse.Namespace) -> str:
    """What of --prefix answers show."""
    return args.prefix.strip() if args.keep_prefix else ""


def as_json(question: Asked, answers: list[list[Answer]], times: Times) -> dict[str, Any]:
    """The result for programs: seconds by stage; with --benchmark they are medians."""
    return {
        "question": question.text,
        "prompt": question.prompt,
        "answers": [[beam.to_json() for beam in beams] for beams in answers],
        "seconds": times.stages,
        "total_seconds": times.total,
        "benchmark": times.repeats,
    }


def as_text(question: Asked, answers: list[list[Answer]], times: Times) -> str:
    """The result for people: prompt, answers, and a table of the stages."""
    lines = [f"[Q] {question.prompt or '(caption)'}"]
    for beams in answers:
        for beam in beams:
            is_one_of_several = beam.score is not None and len(beams) > 1
            score = [f"   ({beam.score:.4f})"] if is_one_of_several else []
            flags = [f"({flag})" for flag in beam.flags]
            lines.append(" ".join(["[A]", *filter(None, [beam.text]), *score, *flags]))
    median = f", median of {times.repeats}" if times.repeats else ""
    lines += ["", f"{'stage':<14}{'time' + median:>22}{'share':>8}"]
    other = times.total - sum(times.stages.values())
    for stage, seconds in [*times.stages.items(), ("other", other), ("total", times.total)]:
        lines.append(f"{stage:<14}{seconds * 1e3:>19.1f} ms{seconds / times.total:>7.0%}")
    return "\n".join(lines)


def program() -> NoReturn:
    """Start it, and exit."""
    cli.run(main)

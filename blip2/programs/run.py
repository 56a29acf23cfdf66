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
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from blip2 import cli
from blip2.errors import Blip2Error
from blip2.programs.run_arguments import (
    ENGINE_FLAGS,
    SAMPLING,
    STANDARD_OUTPUT,
    parse_arguments,
)
from blip2.programs.run_results import Asked, Times, as_json, as_text

if TYPE_CHECKING:
    import torch

    from blip2.answers import Answer
    from blip2.engines import Places
    from blip2.language import GenerationOptions
    from blip2.many.cluster import Cluster
    from blip2.many.outputs import Target
    from blip2.pipeline import Pipeline


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
    from blip2.many.job import Job
    from blip2.many.work import Question
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


def program() -> NoReturn:
    """Start it, and exit."""
    cli.run(main)

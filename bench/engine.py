"""The engine at full size on an NVIDIA GPU, beside fixed batches, in one run.

    python -m bench.engine                        # random weights of the real shapes: no download
    python -m bench.engine --model_dir DIRECTORY  # a BLIP-2 of your own

Answers never end by themselves here: each has as many tokens as it is asked for, all the same number,
or, as captions have, 5 to 20 with a mean of 10. A fixed batch goes on to its longest. "In flight" are
requests that wait or are answered; a new one comes when the oldest is over. "A folder" are windows of
64 pictures, decoded already, as `run.py --output` answers them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from bench.startup import random_checkpoint
from blip2 import cli
from blip2.engine import Engine, Picture, Request
from blip2.engines import Places
from blip2.errors import Blip2Error
from blip2.language import GenerationOptions
from blip2.many import answering
from blip2.pipeline import Pipeline, Stopwatch, open_pipeline

TEXT = "Question: which city is this? Answer:"
TOKENS = 20
IN_FLIGHT = (1, 8, 64, 128)


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise Blip2Error("torch sees no NVIDIA GPU, which is what is measured")
    with tempfile.TemporaryDirectory() as directory:
        model = args.model_dir or random_checkpoint(Path(directory, "checkpoint"))
        bench = Bench(open_pipeline(Places.of(model, model)))
        bench.run()


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Time the engine beside fixed batches.")
    parser.add_argument(
        "--model_dir", type=Path, help="BLIP-2 checkpoint (default: random weights)"
    )
    return parser.parse_args()


class Bench:
    """One pipeline, in fixed batches first and then behind an engine."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        preprocessing = pipeline.vision.preprocessing
        shape = (64, 3, preprocessing.height, preprocessing.width)
        # As a folder's are: ready, in memory that the GPU copies from at full speed.
        self.values = torch.randn(shape).to(pipeline.vision.dtype).pin_memory()

    def options(self, tokens: int) -> GenerationOptions:
        options = self.pipeline.options({"max_output_len": tokens})
        return dataclasses.replace(options, end_id=-1)

    def run(self) -> None:
        fixed = {count: self.fixed(count, TOKENS) for count in (1, 8, 64)}
        for count, rate in fixed.items():
            print(
                f"fixed batches of {count:<3}, {TOKENS} tokens   {rate:>8.1f} captions/s",
                flush=True,
            )
        self.engine = Engine(self.pipeline)
        chance = random.Random(0)
        lengths = [min(TOKENS, max(5, round(chance.gauss(9.5, 3.5)))) for _ in range(1024)]
        lengths[::64] = [TOKENS] * len(lengths[::64])
        for count in (1, 8, 64, 128):  # warm up: every number of rows has its kernels and graphs
            self.in_flight(count, lengths[: max(8, 4 * count)])
            self.in_flight(count, [TOKENS] * max(4, 2 * count))
        for count in IN_FLIGHT:
            rate = self.in_flight(count, [TOKENS] * max(8, 8 * count))
            beside = fixed[min(count, 64)]
            line(f"{count} in flight, {TOKENS} tokens", rate, rate / beside)
        mean = statistics.mean(lengths)
        for count in (128, 256):
            rate = self.in_flight(count, lengths)
            line(f"{count} in flight, {mean:.1f} tokens", rate, rate / fixed[64])
        print(f"first token of one alone        {self.first_token():>8.1f} ms")
        self.engine.close()
        for name, tokens in ((f"{TOKENS}", [TOKENS] * 4096), (f"{mean:.1f}", lengths * 4)):
            rate = self.folder(tokens)
            line(f"a folder, {name} tokens", rate, rate / fixed[64])

    def fixed(self, count: int, tokens: int) -> float:
        """Captions a second."""
        options, values = self.options(tokens), self.values[:count]

        def answer() -> None:
            look = self.pipeline.look(values, Stopwatch())
            self.pipeline.ask(look, [TEXT] * count, options)

        return count / timed(answer, 8)

    def in_flight(self, count: int, lengths: Sequence[int]) -> float:
        """Captions a second, once all rows are in use and before the last begin to end."""
        waiting: collections.deque = collections.deque()
        done: list[float] = []
        options = {tokens: self.options(tokens) for tokens in set(lengths)}
        for number, tokens in enumerate(lengths):
            picture = self.engine.picture(self.values[number % 64])
            waiting.append(self.engine.submit(picture, TEXT, options[tokens]))
            if len(waiting) >= count:
                waiting.popleft().answers()
                done.append(time.perf_counter())
        for request in waiting:
            request.answers()
        # Equal ones end all at once: from the first of one group to the first of another.
        first = len(done) // 4 // count * count
        last = (len(done) - 1) // count * count
        return (last - first) / (done[last] - done[first])

    def folder(self, lengths: Sequence[int]) -> float:
        """Captions a second of whole blocks, behind one that warms up."""
        coming = iter(lengths)

        def request(picture: Picture, input_ids: torch.Tensor, options: GenerationOptions, *rest):
            # Every picture of a run is asked alike: what ends an answer earlier is the answer.
            options = dataclasses.replace(options, max_output_len=next(coming))
            return Request(picture, input_ids, options, *rest)

        size = len(self.values)
        count = len(lengths) // size
        windows = (answering.Window(n * size, size, self.values) for n in range(count))
        done: list[float] = []
        with mock.patch.object(answering, "Request", request):
            arguments = (windows, [TEXT], self.options(TOKENS), size, Stopwatch())
            for _ in answering.answer_in_rows(self.pipeline, *arguments):
                done.append(time.perf_counter())
        first = answering.block_of(self.pipeline, self.options(TOKENS)) - 1
        return (count - 1 - first) * size / (done[-1] - done[first])

    def first_token(self) -> float:
        """Milliseconds from a submission to its first token, of an engine that has nothing to do."""

        def ask() -> None:
            picture = self.engine.picture(self.values[0])
            request = self.engine.submit(picture, TEXT, self.options(1))
            next(request.tokens())
            request.answers()

        return 1e3 * timed(ask, 20)


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median seconds, behind two runs that warm up."""
    seconds = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[2:])


def line(name: str, rate: float, ratio: float) -> None:
    print(f"{name:<31} {rate:>8.1f} captions/s   {ratio:>5.2f}x of fixed batches", flush=True)


if __name__ == "__main__":
    cli.run(main)

"""serve.py under load, from outside its processes, beside the same engines without a server.

    python -m bench.serve                          # random weights of the real shapes: no download
    python -m bench.serve --model_dir DIRECTORY    # a BLIP-2 of your own
    python -m bench.serve --model_dir demo/checkpoint --text "" --seconds 5    # on a CPU

Clients in closed loops, each asking again when it has its answer; then arrivals at random (Poisson) at
shares of what 64 clients got. Clients are in processes of their own. Every request brings a picture
that the server has not seen, as a data: URL. Answers of random weights hardly end by themselves: most
have TOKENS tokens, each of which is a word. "Offline" is what `run.py --output` does with pictures that
are decoded already, "fixed" is batches of 64 of them. "First" is from sending to the first text; it
includes the decoding of the picture, which is said apart. "Token" is from one token of an answer to
the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.serve_clients import TOKENS, Clients, Sample
from blip2 import cli
from blip2.errors import Blip2Error

ROOT = Path(__file__).resolve().parent.parent
TEXT = "Question: which city is this? Answer:"
CLIENTS = (1, 8, 64, 256)
SHARES = (0.5, 0.8, 0.95)
_WARM_UP_SECONDS = 3.0
_START_SECONDS = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model_dir
        if model is None:
            from bench.startup import random_checkpoint

            model = random_checkpoint(Path(directory, "checkpoint"))
        alone = offline(model)
        print(
            f"offline: {alone['rate']:.1f} captions/s, {alone['fixed']:.1f} in fixed batches;"
            f" first token of one alone: {alone['first_ms']:.1f} ms",
            flush=True,
        )
        picture = args.picture.read_bytes() if args.picture else photograph()
        flags = {"workers": args.workers, "http_processes": args.http_processes}
        with serving(model, flags) as server, Clients(server.port, picture, args.text) as clients:
            measure(server, clients, args.seconds, alone)


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measure serve.py under load.")
    parser.add_argument(
        "--model_dir", type=Path, help="BLIP-2 checkpoint (default: random weights)"
    )
    parser.add_argument("--picture", type=Path, help="JPEG or PNG (default: noise, 54 kB of JPEG)")
    parser.add_argument("--text", default=TEXT, help="the question; empty: a caption")
    parser.add_argument(
        "--seconds", type=cli.positive_float, default=15.0, help="of each line, after a warm-up"
    )
    for flag in ("--workers", "--http_processes"):
        parser.add_argument(flag, type=cli.positive_int, help="as serve.py's")
    return parser.parse_args()


def photograph() -> bytes:
    """A JPEG of 640 x 480, some 54 kB, as pictures of the web are."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    coarse = chance.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    grain = chance.normal(0, 6, (480, 640, 3))
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=60)
    return content.getvalue()


def offline(model: Path) -> dict[str, float]:
    """The same engines without a server, in a process whose GPU memory ends with it."""
    code = "import sys; from bench.serve import print_offline; print_offline(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise Blip2Error(f"the engines of {model} do not answer; see above")
    return json.loads(done.stdout.splitlines()[-1])


def print_offline(model: str) -> None:
    """Captions a second of a folder that is decoded, and milliseconds to the first token of one."""
    import torch

    from blip2.engines import Places
    from blip2.many import answering
    from blip2.pipeline import Stopwatch, open_pipeline

    pipeline = open_pipeline(Places.of(model, model))
    size, sides = pipeline.default_batch_size, pipeline.vision.preprocessing
    values = torch.randn(size, 3, sides.height, sides.width).to(pipeline.vision.dtype)
    if pipeline.vision.device.type == "cuda":
        values = values.pin_memory()

    options = dataclasses.replace(pipeline.options({"max_output_len": TOKENS}), end_id=-1)
    block = answering.block_of(pipeline, options)
    windows = (answering.Window(n * size, size, values) for n in range(max(8, 3 * block)))
    answer = answering.answer_in_batches
    if answering.has_rows(pipeline, options):
        answer = answering.answer_in_rows
    ended = []
    for _ in answer(pipeline, windows, [TEXT], options, size, Stopwatch()):
        ended.append(time.perf_counter())
    # Of whole blocks, behind one that warms up; of batches behind two.
    first = max(2, block) - 1
    rate = (len(ended) - 1 - first) * size / (ended[-1] - ended[first])

    batches = (answering.Window(n * size, size, values) for n in range(8))
    ended = [
        time.perf_counter()
        for _ in answering.answer_in_batches(pipeline, batches, [TEXT], options, size, Stopwatch())
    ]
    fixed = (len(ended) - 3) * size / (ended[-1] - ended[2])

    options = dataclasses.replace(options, max_output_len=1)
    seconds = []
    for _ in range(22):
        begun = time.perf_counter()
        pipeline.ask(pipeline.look(values[:1], Stopwatch()), [TEXT], options)
        seconds.append(time.perf_counter() - begun)
    first_ms = 1e3 * statistics.median(seconds[2:])
    print(json.dumps({"rate": rate, "fixed": fixed, "first_ms": first_ms}))


@dataclasses.dataclass(frozen=True)
class Server:
    """One that runs: where, and its processes."""

    port: int
    pid: int

    def seconds_of_processors(self) -> dict[str, float]:
        """What each of its kinds of process has used of processors."""
        found = {"HTTP": 0.0, "engines": 0.0, "decoders": 0.0}
        for pid in (self.pid, *_descendants(self.pid)):
            if (kind := _KINDS.get(Path(f"/proc/{pid}/comm").read_text().strip(), "HTTP")) in found:
                found[kind] += _seconds_of(pid)
        return found


_KINDS = {"blip2-engines": "engines", "blip2-decoder": "decoders"}


def _seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS  # proc(5): utime, stime


def _descendants(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in listed for child in path.read_text().split()]
    return [*children, *(further for child in children for further in _descendants(child))]


@contextlib.contextmanager
def serving(model: Path, flags: dict[str, int | None]) -> Iterator[Server]:
    """serve.py as a process of its own, until the end of the context; None is its default."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "--port", str(port), "--max_waiting", "1024"]
    command += ["--engine_dir", str(model), "--opt_engine_dir", str(model)]
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            asyncio.run(_until_ready(port, process))
            yield Server(port, process.pid)
        finally:
            process.terminate()
            process.wait()


async def _until_ready(port: int, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError, EOFError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
            if b" 200 " in status:
                return
        await asyncio.sleep(0.2)
    raise Blip2Error("the server does not start; see above")


def measure(server: Server, clients: Clients, seconds: float, alone: dict[str, float]) -> None:
    """Print a line for each load."""
    print(f"{'':<22}{'answers/s':>10}{'offline':>9}{'fixed':>7}{'tokens':>8}", end="")
    for name in ("first", "token", "whole"):
        print(f"{name + ', ms: p50':>17}{'p95':>8}{'p99':>8}", end="")
    print(flush=True)
    rates, idle = {}, 0.0
    for count in CLIENTS:
        clients.closed(count, _WARM_UP_SECONDS)
        before = server.seconds_of_processors()
        samples = clients.closed(count, seconds)
        after = server.seconds_of_processors()
        rates[count] = line(f"{count} in closed loop", alone, samples)
        if count == 1:
            idle = percentile([s.whole for s in samples], 99)
            bare = statistics.median(s.first - s.decode for s in samples)
            decode = statistics.median(s.decode for s in samples)
            more = 1e3 * bare - alone["first_ms"]
            print(
                f"    first {more:+.1f} ms beside the pipeline's, and {1e3 * decode:.1f} to decode"
            )
        used = {name: 1e3 * (after[name] - before[name]) / len(samples) for name in after}
        shares = ", ".join(f"{name} {ms:.2f}" for name, ms in used.items())
        print(f"    ms of processors an answer: {shares}", flush=True)
    for share in SHARES:
        samples = clients.poisson(share * rates[64], seconds)
        line(f"random, {share:.0%} of 64's", alone, samples)
        slower = percentile([s.whole for s in samples], 99) / idle
        print(f"    whole answers' p99: {slower:.1f}x of one client's", flush=True)


def line(name: str, alone: dict[str, float], samples: Sequence[Sample]) -> float:
    """Print a load's numbers; returns the answers a second."""
    took = max(s.begun + s.whole for s in samples) - min(s.begun for s in samples)
    rate = len(samples) / took
    tokens = statistics.mean(sample.tokens for sample in samples)
    print(
        f"{name:<22}{rate:>10.1f}{rate / alone['rate']:>9.0%}{rate / alone['fixed']:>7.0%}", end=""
    )
    print(f"{tokens:>8.1f}", end="")
    parts: tuple[Callable[[Sample], float], ...] = (
        lambda s: s.first,
        lambda s: s.token,
        lambda s: s.whole,
    )
    for part in parts:
        values = [part(sample) for sample in samples]
        p50, p95, p99 = (1e3 * percentile(values, share) for share in (50, 95, 99))
        print(f"{p50:>17.1f}{p95:>8.1f}{p99:>8.1f}", end="")
    print(flush=True)
    return rate


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent do not exceed: the nearest rank."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * int(share) // 100) - 1)]


if __name__ == "__main__":
    cli.run(main)

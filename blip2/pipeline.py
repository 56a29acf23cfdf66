"""Pictures and questions in, answers out: ViT → Q-Former → OPT, each stage timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from blip2 import artifacts, memory
from blip2.answers import Answer, Decode
from blip2.checkpoints import TokenIds
from blip2.engines import Places, open_language_session, open_vision_session
from blip2.errors import Blip2Error
from blip2.language import Generation, GenerationOptions, LanguageSession
from blip2.language.stopping import StopTexts
from blip2.layout import CONVERT, EXPORT
from blip2.prompts import Tokenizer, build_input_ids, load_tokenizer
from blip2.vision.session import VisionSession

_LESS_OPT = f"free some, or convert OPT to less with: {CONVERT} --use_weight_only"
_LESS_VISION = "free some, or use --dtype float16 and a smaller --max_batch_size for these engines"

T = TypeVar("T")


class Stopwatch:
    """Seconds by stage, in order of first use; waits for the GPU where there is one."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """`seconds` are those of stages that are over."""
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class QueuedStopwatch:
    """As `Stopwatch`, for what is queued on a GPU: the host goes on at once, and asks later."""

    def __init__(self, device: torch.device) -> None:
        """Of what is queued on a device's current stream."""
        self._is_queued = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((stage, start, self._mark()))

    def _mark(self) -> Any:
        if not self._is_queued:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def is_over(self) -> bool:
        """Whether all of it was done."""
        return not self._is_queued or all(end.query() for _, _, end in self._marks)

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, of what is over; one that was tried twice counts as often."""
        found: dict[str, float] = {}
        for stage, start, end in self._marks:
            took = 1e-3 * start.elapsed_time(end) if self._is_queued else end - start
            found[stage] = found.get(stage, 0.0) + took
        return found


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Look:
    """What the ViT and the Q-Former made of pictures.

    `image_embeds` is B x T x H_v, `query_output` B x n x H_lm; both may lie in memory that the next
    look overwrites. `finite` has a flag for each of STAGES, on the device: reading them makes the
    host wait, so that is done when it waits for an answer anyway.
    """

    query_output: torch.Tensor
    finite: torch.Tensor
    image_embeds: torch.Tensor | None = None


STAGES = ("ViT", "Q-Former")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The two sessions and the tokenizer between them.

    `verification` is of the files behind the sessions: while it goes on pictures are looked at, but
    nothing is answered before it has ended well.

    Raises:
        Blip2Error: on construction, when the parts do not fit one another.
    """

    vision: VisionSession
    language: LanguageSession
    tokenizer: Tokenizer
    verification: artifacts.Verification | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size > self.language.vocab_size:
            raise Blip2Error(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, this OPT only"
                f" {self.language.vocab_size}",
                "use the tokenizer exported with the checkpoint",
            )
        if self.vision.output_size != self.language.hidden_size:
            raise Blip2Error(
                f"the Q-Former's output has hidden size {self.vision.output_size}, this OPT has"
                f" {self.language.hidden_size}",
                "use the OPT that belongs to the BLIP-2 checkpoint",
            )

    def options(self, decoding: dict[str, Any]) -> GenerationOptions:
        """How to decode: fields of GenerationOptions, and the ids that this tokenizer has for it.

        `stop` is a text, or several. With any of top_k, top_p and temperature tokens are sampled;
        without top_k among all.

        Raises:
            Blip2Error: a field has a value that it cannot have.
        """
        ids = {"end_id": self.tokenizer.end_id, "pad_id": self.tokenizer.pad_id}
        sampling = ("top_k", "top_p", "temperature")
        if any(decoding.get(name) is not None for name in sampling):
            decoding = {**decoding, "top_k": decoding.get("top_k") or 0}
        given = {name: value for name, value in decoding.items() if value is not None}
        if texts := given.pop("stop", None):
            texts = [texts] if isinstance(texts, str) else texts
            given["stop"] = _stop_texts(tuple(texts), self.tokenizer, self.language.vocab_size)
        return GenerationOptions(**ids, **given)

    def decoder(self, prefix: str = "") -> Decode:
        """What turns an answer's ids into its text, which begins with a prefix that was given."""
        if not prefix:
            return self.tokenizer.decode
        given = self.tokenizer.encode(prefix)[1:]
        return lambda ids: self.tokenizer.decode([*given, *ids])

    def check(self, texts: Sequence[str], options: GenerationOptions) -> None:
        """See that the engine can take such questions, before any work.

        Raises:
            Blip2Error: a text, or what is asked for, exceeds a limit.
        """
        rows = (self.vision.num_query_tokens, self.language.hidden_size)
        self.language.check(self.encode(texts), torch.empty(len(texts), *rows), options)

    @property
    def default_batch_size(self) -> int:
        """64 on a GPU, 16 on a CPU, and no more than either engine takes at once."""
        limits = (self.vision.max_batch_size, self.language.limits.max_batch_size)
        wanted = 64 if self.vision.device.type == "cuda" else 16
        return min([wanted, *(limit for limit in limits if limit)])

    @property
    def default_rows(self) -> int:
        """Answers under way at once, where each has a row: of four batches on a GPU, else of one.

        A step of 256 rows takes an H100 1.8x one of 64; and while some are answered, the next ones'
        pictures are looked at in a full batch.
        """
        return self.default_batch_size * (4 if self.vision.device.type == "cuda" else 1)

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """input_ids of each text behind its picture's ids; an empty text asks for a caption."""
        count, vocab_size = self.vision.num_query_tokens, self.language.vocab_size
        return [build_input_ids(self.tokenizer.encode(text), count, vocab_size) for text in texts]

    def prepare(self, texts: Sequence[str], options: GenerationOptions) -> None:
        """Have what a batch with these texts needs compiled; `look` and `ask` wait for it.

        All at once, where they would compile one kernel after another, each when it is needed.
        """
        lengths = [len(ids) for ids in self.encode(texts)]
        try:
            self.vision.prepare(len(texts))
            self.language.prepare(lengths, self.vision.num_query_tokens, options)
        except Exception as error:
            if not memory.exhausted(error):  # else `look` and `ask` will say so, or do with less
                raise

    def answer(
        self,
        pixel_values: torch.Tensor,
        texts: Sequence[str],
        options: GenerationOptions,
        stopwatch: Stopwatch | None = None,
        prefix: str = "",
    ) -> list[list[Answer]]:
        """Ask `texts[i]` of picture i: for each picture its beams, best first.

        Args:
            pixel_values: B x 3 x S x S, or their pixels: see `VisionSession.vit`.
            texts: B prompts.
            options: how to decode; `end_id` and `pad_id` are the tokenizer's.
            stopwatch: where to add the seconds of each stage.
            prefix: as `ask`.

        Raises:
            Blip2Error: an input that the engines cannot take, or a stage that yields NaN or Inf.
        """
        watch = stopwatch or Stopwatch()
        with watch.time("ViT"):  # which waits for its kernels first
            self.prepare(texts, options)
        look = self.look(pixel_values, watch)
        with watch.time("OPT"):
            return self.ask(look, texts, options, prefix)

    def look(self, pixel_values: torch.Tensor, stopwatch: Stopwatch | QueuedStopwatch) -> Look:
        """What the ViT and the Q-Former make of pictures, B x 3 x S x S: see `VisionSession.vit`.

        A batch for which memory does not suffice is halved, once, for good.

        Raises:
            Blip2Error: pictures of another size, or too little memory.
        """

        def stages() -> Look:
            with stopwatch.time("ViT"):
                image_embeds = self.vision.vit(pixel_values)
            with stopwatch.time("Q-Former"):
                query_output = self.vision.qformer(image_embeds)
            outputs = (image_embeds, query_output)
            finite = torch.stack([torch.isfinite(output).all() for output in outputs])
            return Look(query_output, finite, image_embeds)

        halve = self.vision.halve_batch
        return _halving("ViT and Q-Former", len(pixel_values), stages, halve)

    def ask(
        self, look: Look, texts: Sequence[str], options: GenerationOptions, prefix: str = ""
    ) -> list[list[Answer]]:
        """Ask `texts[i]` of picture i of a look. Memory that does not suffice is met as in `look`.

        `prefix` is the end of the texts that answers are to begin with.

        Raises:
            Blip2Error: an input that the engine cannot take, too little memory, a stage that yields
                NaN or Inf, or files that are not what they were.
        """

        def generate() -> list[Generation]:
            return self.language.generate(self.encode(texts), look.query_output, options)

        try:
            generations = _halving("OPT", len(texts), generate, self.language.halve_batch)
        except Blip2Error:
            self.check_look(look)  # what went wrong before is the better explanation
            raise
        self.check_look(look)
        decode = self.decoder(prefix)
        return [
            [Answer.of(beam, decode) for beam in generation.beams] for generation in generations
        ]

    def check_look(self, look: Look) -> None:
        """See that the files behind the engines are sound, and what the ViT and Q-Former made.

        Raises:
            Blip2Error: they are not, or that is NaN or Inf.
        """
        self.check_files()
        for stage, finite in zip(STAGES, look.finite.tolist(), strict=True):
            if finite:
                continue
            raise self.not_finite(stage)

    def check_files(self) -> None:
        """See that the files behind the engines are sound.

        Raises:
            Blip2Error: one is not.
        """
        if self.verification is not None:
            self.verification.finish()

    def not_finite(self, stage: str) -> Blip2Error:
        """What to say where a stage yields NaN or Inf."""
        if self.vision.dtype == torch.float16:
            return Blip2Error(
                f"the {stage} yields NaN or Inf: float16 has overflowed, or the checkpoint is damaged",
                f"run it in float32: {EXPORT} --dtype float32 --output_dir float32, then take"
                " float32/onnx as `engine_dir`",
            )
        return Blip2Error(
            f"the {stage} yields NaN or Inf, in float32 too; the checkpoint or the picture's"
            " values are damaged",
            "download the checkpoint again",
        )


@functools.lru_cache(16)  # of a real vocabulary it takes a tenth of a second
def _stop_texts(texts: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int) -> StopTexts:
    return StopTexts(texts, tokenizer.token_bytes(vocab_size))


def _halving(stage: str, batch_size: int, run: Callable[[], T], halve: Callable[[int], int]) -> T:
    """What `run` returns; where memory does not suffice, once more after `halve`, and said so.

    Args:
        stage: for the messages.
        batch_size: of this run; a batch of 1 is not run again.
        run: the work.
        halve: a session's `halve_batch`.

    Raises:
        OutOfMemory: the half is too much too.
    """
    advice = "lower `batch_size`, `num_beams` or `max_output_len`, or free some memory"
    try:
        with memory.needed(f"for the {stage} on a batch of {batch_size}", advice):
            return run()
    except memory.OutOfMemory as error:
        if batch_size == 1:
            raise
        message = error.problem
    # Not in the handler, where the failed run's tensors would still be alive.
    half = halve(batch_size)
    memory.release()
    print(f"note: {message}; going on with batches of {half}", file=sys.stderr)
    with memory.needed(f"for the {stage} on a batch of {half}", advice):
        return run()


def open_pipeline(places: Places, verify: bool = True, precision: str | None = None) -> Pipeline:
    """Open the engines that the artifacts in some places call for, and the tokenizer beside them.

    Args:
        places: where they are.
        verify: compare large files too with their hashes; small ones always are.
        precision: of OPT's weights; None is its artifact's: see `open_language_session`.

    Raises:
        Blip2Error: an artifact is missing, damaged, or does not fit the others.
        SystemExit: this process was started beside others to lend its GPU, and has.
    """
    here = places.fetched()
    engine_dir, opt_engine_dir = Path(here.engine_dir), Path(here.opt_engine_dir)
    # Descriptions first: what does not fit is refused before gigabytes are read.
    opt = open_language_session(opt_engine_dir, precision)
    if not opt.takes_requests:
        with memory.needed(f"to load {opt_engine_dir}", _LESS_OPT):
            opt.lend()
    vision = open_vision_session(engine_dir, Path(here.query_tokens))
    if here.tokenizer is None:
        tokenizer = load_tokenizer(here.own_tokenizer)
    else:  # where prompts begin and answers end is known beside the engines
        tokenizer = load_tokenizer(here.tokenizer, TokenIds.beside(here.own_tokenizer))
    verification = artifacts.Verification(here.described(), verify)
    pipeline = Pipeline(vision, opt, tokenizer, verification)
    with memory.needed(f"to load {engine_dir}", _LESS_VISION):
        vision.load()
    with memory.needed(f"to load {opt_engine_dir}", _LESS_OPT):
        opt.load()
    return pipeline

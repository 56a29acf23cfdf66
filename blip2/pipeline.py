"""Pictures and questions in, answers out: ViT → Q-Former → OPT, each stage timed."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from blip2.artifacts import UserError
from blip2.language import GenerationOptions, LanguageSession, open_language_session
from blip2.prompts import Tokenizer, build_input_ids, load_tokenizer
from blip2.vision import open_vision_session
from blip2.vision.session import VisionSession


@dataclasses.dataclass(frozen=True)
class Answer:
    """One beam's text, with its score where the engine gives one."""

    text: str
    score: float | None = None


class Stopwatch:
    """Seconds by stage, in order of first use; waits for the GPU where there is one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The two sessions and the tokenizer between them.

    `vision` is None in a process whose language session takes no requests: there is nothing to ask
    such a pipeline, it is there to be closed.

    Raises:
        UserError: on construction, when the tokenizer does not fit the OPT.
    """

    vision: VisionSession | None
    language: LanguageSession
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size > self.language.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, this OPT only"
                f" {self.language.vocab_size}; use the tokenizer exported with the checkpoint"
            )

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """input_ids of each text behind its picture's ids; an empty text asks for a caption."""
        count, vocab_size = self.vision.num_query_tokens, self.language.vocab_size
        return [build_input_ids(self.tokenizer.encode(text), count, vocab_size) for text in texts]

    def answer(
        self,
        pixel_values: torch.Tensor,
        texts: Sequence[str],
        options: GenerationOptions,
        stopwatch: Stopwatch | None = None,
    ) -> list[list[Answer]]:
        """Ask `texts[i]` of picture i: for each picture its beams, best first.

        Args:
            pixel_values: B x 3 x S x S.
            texts: B prompts.
            options: how to decode; `end_id` and `pad_id` are the tokenizer's.
            stopwatch: where to add the seconds of each stage.

        Raises:
            UserError: an input that the engines cannot take, or a stage that yields NaN or Inf.
        """
        watch = stopwatch or Stopwatch()
        query_output = self.look(pixel_values, watch)
        with watch.time("OPT"):
            return self.ask(query_output, texts, options)

    def look(self, pixel_values: torch.Tensor, stopwatch: Stopwatch) -> torch.Tensor:
        """What OPT reads of the pictures: pixel_values B x 3 x S x S → B x n x H_lm.

        Raises:
            UserError: pictures of another size, or a stage that yields NaN or Inf.
        """
        with stopwatch.time("ViT"):
            image_embeds = self.vision.vit(pixel_values)
        with stopwatch.time("Q-Former"):
            query_output = self.vision.qformer(image_embeds)
        _check_finite({"ViT": image_embeds, "Q-Former": query_output})
        return query_output

    def ask(
        self, query_output: torch.Tensor, texts: Sequence[str], options: GenerationOptions
    ) -> list[list[Answer]]:
        """Ask `texts[i]` of the picture in query_output[i], as `look` returns it.

        Raises:
            UserError: an input that the engine cannot take.
        """
        generations = self.language.generate(self.encode(texts), query_output, options)
        return [
            [Answer(self.tokenizer.decode(beam.token_ids), beam.score) for beam in generation.beams]
            for generation in generations
        ]


def open_pipeline(
    engine_dir: str | Path,
    opt_engine_dir: str | Path,
    query_tokens: str | Path,
    tokenizer: str | Path | None = None,
) -> Pipeline:
    """Open the engines that the artifacts in two directories call for.

    Args:
        engine_dir: holds the ViT and the Q-Former.
        opt_engine_dir: holds the OPT.
        query_tokens: the file query_tokens.pt of the export.
        tokenizer: directory or hub id; None is the checkpoint in `engine_dir`, or else `tokenizer/`
            beside the query tokens.

    Raises:
        UserError: an artifact is missing, damaged, or does not fit the others.
    """
    language = open_language_session(Path(opt_engine_dir))
    pipeline = Pipeline(
        open_vision_session(Path(engine_dir), Path(query_tokens))
        if language.takes_requests
        else None,
        language,
        load_tokenizer(tokenizer or _tokenizer_beside(Path(engine_dir), Path(query_tokens))),
    )
    language.load()
    return pipeline


def _tokenizer_beside(engine_dir: Path, query_tokens: Path) -> Path:
    is_checkpoint = (engine_dir / "config.json").is_file()
    return engine_dir if is_checkpoint else query_tokens.parent / "tokenizer"


def _check_finite(outputs: dict[str, torch.Tensor]) -> None:
    for stage, output in outputs.items():
        if not torch.isfinite(output).all():
            raise UserError(
                f"the {stage} yields NaN or Inf; export it again with --dtype float32, and check the"
                " checkpoint"
            )

"""BLIP-2 from Python: `blip2.load`, and what it returns. docs/python.md has examples."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, overload

import numpy as np
import torch
from PIL import Image

from blip2 import devices, engine, images, pipeline
from blip2.checkpoints import is_checkpoint, locate
from blip2.engine import Engine
from blip2.engines import Places
from blip2.errors import Blip2Error
from blip2.pipeline import Pipeline, Stopwatch, open_pipeline
from blip2.templates import TEMPLATE, begin_answer, fill_template

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A file's path or its content, an http(s) URL, a picture of Pillow's, or its pixels: height x width,
# or height x width x 3 or 4, uint8; the fourth channel is opacity.
Picture = str | Path | bytes | Image.Image | np.ndarray


_AHEAD = 256  # requests of a list that wait or are under way, at most


class Decoding(TypedDict, total=False):
    """How to decode: fields of `GenerationOptions`. Any of the last three means sampling."""

    max_output_len: int
    min_output_len: int
    stop: str | Sequence[str]
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    repetition_penalty: float
    early_stopping: bool
    seed: int
    top_k: int
    top_p: float
    temperature: float


@dataclasses.dataclass(frozen=True)
class Answer(pipeline.Answer):
    """A text; `str` is that text.

    `log_prob` is the mean log probability of its tokens, None where the engine does not say it;
    `score` is what a beam search ranks it by, else the same. `finished` is false of a text that was
    cut at max_output_len; `flags` names what is suspicious of it. `beams` are all answers where there
    are several: those of a beam search, best first, or of num_return_sequences draws; the text is the
    first's.
    """

    beams: tuple[pipeline.Answer, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Features:
    """What BLIP-2 sees in B pictures, on the engines' device.

    `image_embeds` are the ViT's, B x tokens x its width, in its dtype; `query_output` is what OPT
    reads, B x query tokens x OPT's hidden size.
    """

    image_embeds: torch.Tensor
    query_output: torch.Tensor


def load(
    engine_dir: str | Path,
    opt_engine_dir: str | Path | None = None,
    *,
    query_tokens: str | Path | None = None,
    hf_model_location: str | Path | None = None,
    precision: str | None = None,
    device: str | torch.device | None = None,
    verify: bool = True,
) -> Model:
    """Load a BLIP-2 checkpoint, or the engines made of one: what the directories hold decides.

    Args:
        engine_dir: a BLIP-2 checkpoint's directory or hub id ("Salesforce/blip2-opt-2.7b"), or the
            ViT and Q-Former as the scripts export and build them (`onnx`, `plan`, or the directory
            that has them).
        opt_engine_dir: OPT: a TensorRT-LLM engine, a converted checkpoint, or a BLIP-2's or OPT's.
            None is the checkpoint in `engine_dir`.
        query_tokens: the export's query_tokens.pt; None is the one by `engine_dir`.
        hf_model_location: the tokenizer, a directory or hub id; None is the engines' own.
        precision: of OPT's weights: "float16", "int8", "int4" or "float8", of a checkpoint that is in
            none of them yet; None is what it was converted to, or else float16.
        device: "cpu", "cuda" or "cuda:N"; None is the current GPU, or without one the CPU.
        verify: compare large files with the hashes that were written with them.

    Raises:
        Blip2Error: something is missing, damaged, or does not fit the rest.
    """
    if opt_engine_dir is None:
        if not is_checkpoint(locate(engine_dir)):
            raise Blip2Error(
                f"{engine_dir} is no BLIP-2 checkpoint, and has no OPT", "give `opt_engine_dir` too"
            )
        opt_engine_dir = engine_dir
    places = Places.of(engine_dir, opt_engine_dir, query_tokens, hf_model_location)
    with devices.chosen(device):
        opened = open_pipeline(places, verify, precision)
    for session, place in ((opened.vision, engine_dir), (opened.language, opt_engine_dir)):
        if device is not None and session.device.type != torch.device(device).type:
            raise Blip2Error(
                f"{place} runs on {session.device.type} alone", "leave out `device`, or give that"
            )
    return Model(opened)


class Model:
    """BLIP-2, loaded. Any number of threads may ask it at the same time; they share its steps.

    Methods that take pictures take one or a list, and give one or a list. A list of pictures with
    one question, or one picture with a list of questions, is every one of them with it; lists of
    both go in pairs.
    """

    def __init__(self, opened: Pipeline) -> None:
        """Of an open pipeline: see `load`."""
        self._pipeline, self._engine = opened, Engine(opened)
        # Its thread would keep the engines in memory.
        weakref.finalize(self, self._engine.close)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way, and let the engines and their memory go."""
        self._engine.close()
        self._pipeline.language.close()

    @overload
    def caption(
        self,
        pictures: Picture,
        *,
        prefix: str = ...,
        keep_prefix: bool = ...,
        **decoding: Unpack[Decoding],
    ) -> Answer: ...

    @overload
    def caption(
        self,
        pictures: Sequence[Picture],
        *,
        prefix: str = ...,
        keep_prefix: bool = ...,
        **decoding: Unpack[Decoding],
    ) -> list[Answer]: ...

    def caption(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        prefix: str = "",
        keep_prefix: bool = False,
        **decoding: Unpack[Decoding],
    ) -> Answer | list[Answer]:
        """Say what is in the pictures; as `ask`, of which it is the empty question.

        Raises:
            Blip2Error: a picture cannot be read, or the engines cannot decode so.
        """
        return self.ask(pictures, "", prefix=prefix, keep_prefix=keep_prefix, **decoding)

    @overload
    def ask(
        self,
        pictures: Picture,
        questions: str,
        *,
        prompt_template: str = ...,
        prefix: str = ...,
        keep_prefix: bool = ...,
        **decoding: Unpack[Decoding],
    ) -> Answer: ...

    @overload
    def ask(
        self,
        pictures: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        prompt_template: str = ...,
        prefix: str = ...,
        keep_prefix: bool = ...,
        **decoding: Unpack[Decoding],
    ) -> list[Answer]: ...

    def ask(
        self,
        pictures: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        prompt_template: str = TEMPLATE,
        prefix: str = "",
        keep_prefix: bool = False,
        **decoding: Unpack[Decoding],
    ) -> Answer | list[Answer]:
        """Answer questions about pictures. A list may be long: it is read as it is answered.

        Args:
            pictures: one or a list.
            questions: one or a list; an empty one asks for a caption.
            prompt_template: what OPT reads, {} being the question; "{}" is the question as it is.
            prefix: how every answer begins: "a photo of".
            keep_prefix: leave it in the texts.
            decoding: see `Decoding`.

        Raises:
            Blip2Error: a picture cannot be read, a question is too long, or the engines cannot
                decode so.
            ValueError: two lists have different lengths.
        """
        asked = _pairs(pictures, questions)
        options = self._pipeline.options(decoding)
        kept = prefix.strip() if keep_prefix else ""
        opened: dict[int, engine.Picture] = {}  # each is looked at once
        requests: list[engine.Request] = []
        try:
            for number, (picture, question) in enumerate(asked):
                if id(picture) not in opened:
                    opened[id(picture)] = self._open(picture)
                prompt = begin_answer(fill_template(prompt_template, question), prefix)
                looked_at = opened[id(picture)]
                requests.append(
                    self._engine.submit(looked_at, prompt, options, number, prefix=kept)
                )
                if number >= _AHEAD:
                    requests[number - _AHEAD].answers()
            answers = [_answer(request.answers()) for request in requests]
        finally:
            for request in requests:
                request.cancel()  # where an error came up; of what is over nothing changes
        return answers if _is_list(pictures) or _is_list(questions) else answers[0]

    def stream(
        self,
        picture: Picture,
        question: str = "",
        *,
        prompt_template: str = TEMPLATE,
        prefix: str = "",
        keep_prefix: bool = False,
        **decoding: Unpack[Decoding],
    ) -> Iterator[str]:
        """The answer about one picture, piece by piece as it is made; joined they are its text.

        Engines that say nothing before they have ended give it in one piece. Leaving the iterator
        ends the request.

        Raises:
            Blip2Error: as `ask`; beams cannot be streamed.
        """
        options = self._pipeline.options(decoding)
        if options.num_beams > 1:
            raise Blip2Error(
                "the text of a beam search is known at its end", "leave out `num_beams`, or use ask"
            )
        if options.sequences > 1:
            raise Blip2Error(
                "a stream is one answer", "leave out `num_return_sequences`, or use ask"
            )
        kept = prefix.strip() if keep_prefix else ""
        prompt = begin_answer(fill_template(prompt_template, question), prefix)
        request = self._engine.submit(self._open(picture), prompt, options, prefix=kept)
        weakref.finalize(stream := _Stream(self, request), request.cancel)
        return stream

    def features(self, pictures: Picture | Sequence[Picture]) -> Features:
        """What the ViT and the Q-Former make of pictures, for other models to use.

        Raises:
            Blip2Error: a picture cannot be read, or the engines yield NaN or Inf.
        """
        pictures = pictures if _is_list(pictures) else [pictures]
        values = torch.stack([self._open(picture).pixel_values for picture in pictures])

        def look() -> Features:
            seen = self._pipeline.look(values, Stopwatch())
            self._pipeline.check_look(seen)
            return Features(seen.image_embeds.clone(), seen.query_output.clone())

        return self._engine.call(look)

    def _open(self, picture: Picture) -> engine.Picture:
        preprocessing = self._pipeline.vision.preprocessing
        pixels = images.resized_pixels(_open(picture), preprocessing)
        return self._engine.picture(torch.from_numpy(pixels))


class _Stream(Iterator[str]):
    """A request's pieces; while somebody takes them the model stays."""

    def __init__(self, model: Model, request: engine.Request) -> None:
        self._model, self._request, self._pieces = model, request, request.pieces()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the request, of which no more is wanted."""
        self._request.cancel()


def _is_list(argument: object) -> bool:
    return isinstance(argument, Sequence) and not isinstance(argument, str | bytes)


def _pairs(
    pictures: Picture | Sequence[Picture], questions: str | Sequence[str]
) -> list[tuple[Picture, str]]:
    """Each picture with its question, where both are lists; else the one with all of the other."""
    if not _is_list(pictures):
        return [(pictures, text) for text in (questions if _is_list(questions) else [questions])]
    if not _is_list(questions):
        return [(picture, questions) for picture in pictures]
    if len(pictures) != len(questions):
        raise ValueError(f"{len(pictures)} pictures and {len(questions)} questions are no pairs")
    return list(zip(pictures, questions, strict=True))


def _open(picture: Picture) -> Image.Image:
    """8-bit RGB.

    Raises:
        Blip2Error: it cannot be read.
    """
    if isinstance(picture, np.ndarray):
        layered = picture.ndim == 3 and picture.shape[2] in (3, 4)
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or layered) or not picture.size:
            raise Blip2Error(
                f"an array of {picture.dtype} of shape {picture.shape} is no picture",
                "give height x width (x 3 or 4) of uint8",
            )
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return images.normalise(picture)
    if isinstance(picture, bytes):
        return images.decode_image(picture, "the picture")
    if not isinstance(picture, str | Path):
        raise TypeError(f"{type(picture).__name__} is no picture")
    return images.load_image(picture)


def _answer(beams: Sequence[pipeline.Answer]) -> Answer:
    best = beams[0]
    fields = {field.name: getattr(best, field.name) for field in dataclasses.fields(best)}
    return Answer(**fields, beams=tuple(beams) if len(beams) > 1 else ())

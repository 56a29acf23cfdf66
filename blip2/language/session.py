"""One interface for every engine that runs OPT behind BLIP-2's Q-Former.

session = open_language_session(Path("opt/2.7B/trt_ckpt/fp16/1-gpu"))
[answer] = session.generate([input_ids], prompt_table, GenerationOptions(end_id=50118))
answer.beams[0].token_ids
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from blip2.errors import Blip2Error
from blip2.language.stopping import StopTexts

if TYPE_CHECKING:
    from blip2.language.rows import Rows


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How to decode. Names and meanings are TensorRT-LLM's and Hugging Face's.

    `top_k` 1 is greedy and 0 means the whole vocabulary; with `num_beams` above 1 it must stay 1.
    Sampling draws one number per request and token from a generator seeded with (`seed`, index of
    the request), so an answer does not depend on what else is in its batch.
    `length_penalty` p divides a beam's log probability by its new tokens, end included, to the p.
    `early_stopping` ends a beam search as soon as `num_beams` answers are finished; otherwise it
    goes on while a running beam could still beat the worst of them (Hugging Face's default).
    `min_output_len` are tokens before which no answer ends by `end_id`; `stop` are texts at which it
    ends, too. `num_return_sequences` is how many answers each request gets: draws of a sampling, or
    the best beams; None is one draw, or all beams.
    """

    end_id: int
    pad_id: int = 1
    max_output_len: int = 30
    min_output_len: int = 0
    num_beams: int = 1
    num_return_sequences: int | None = None
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    early_stopping: bool = False
    stop: StopTexts | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (valid, wanted) in {
            "max_output_len": (self.max_output_len >= 1, "at least 1"),
            "min_output_len": (
                0 <= self.min_output_len <= self.max_output_len,
                "at least 0 and at most `max_output_len`",
            ),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "num_return_sequences": (self.sequences >= 1, "at least 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "length_penalty": (math.isfinite(self.length_penalty), "a finite number"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
        }.items():
            if not valid:
                raise Blip2Error(f"`{name}` is {getattr(self, name)}", f"give one that is {wanted}")
        if self.num_beams > 1 and self.top_k != 1:
            raise Blip2Error(
                "beam search and sampling exclude each other",
                "leave out `num_beams`, or `top_k`, `top_p` and `temperature`",
            )
        if self.sequences > self.num_beams and not self.samples:
            raise Blip2Error(
                f"`num_return_sequences` is {self.sequences}, and `num_beams` {self.num_beams}",
                "raise `num_beams` to as many, or sample, with `temperature` or `top_p`",
            )

    @property
    def sequences(self) -> int:
        """Answers that each request gets."""
        given = self.num_return_sequences
        return self.num_beams if given is None else given

    @property
    def rows(self) -> int:
        """Rows that each request has: its beams, or its draws."""
        return max(self.num_beams, self.sequences)

    def to_json(self) -> dict[str, Any]:
        """Every field, the texts for what finds them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "stop": [] if self.stop is None else list(self.stop.texts)}

    @property
    def is_held(self) -> bool:
        """Whether the end token cannot come before some others."""
        return self.min_output_len > 0 and self.end_id >= 0

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random, rather than searched for."""
        return self.top_k != 1


@dataclasses.dataclass(frozen=True)
class Beam:
    """One answer: new token ids without the end token.

    `score` is what beams are ranked by (beam search only). `log_prob` is the mean log probability of
    its tokens, the end token included: as the model has them, or with a beam search those that it
    adds up, which a repetition penalty has changed; None where the engine does not say it.
    `finished` says whether the end came, before max_output_len tokens.
    """

    token_ids: list[int]
    score: float | None = None
    finished: bool = True
    log_prob: float | None = None

    @classmethod
    def cut(
        cls, token_ids: list[int], options: GenerationOptions, log_probs: float | None = None
    ) -> Beam:
        """The answer at the begin of some ids, which goes to the first thing that ends it.

        Args:
            token_ids: new ids; behind the end anything.
            options: what ends it.
            log_probs: the sum over the answer's tokens, the end included, if it is known.
        """
        ended = options.end_id in token_ids
        ids = token_ids[: token_ids.index(options.end_id)] if ended else token_ids
        length = None if options.stop is None else options.stop.length(ids)
        if length is not None:
            return cls(ids[:length], finished=True, log_prob=_mean(log_probs, length))
        return cls(ids, finished=ended, log_prob=_mean(log_probs, len(ids) + ended))

    def ranked(self, score: float, options: GenerationOptions) -> Beam:
        """The same as a beam of a search, by its log probabilities' sum over its length to the
        length penalty."""
        length = len(self.token_ids) + (self.finished and not self.is_stopped(options))
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(score * np.float64(length) ** (options.length_penalty - 1))
        log_prob = mean if math.isfinite(mean) else None
        return dataclasses.replace(self, score=score, log_prob=log_prob)

    def is_stopped(self, options: GenerationOptions) -> bool:
        """Whether a text has ended it, rather than the end token."""
        return options.stop is not None and options.stop.length(self.token_ids) is not None


def _mean(total: float | None, count: int) -> float | None:
    return None if total is None or not math.isfinite(total) else total / max(count, 1)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answers to one request, best first: see `GenerationOptions.sequences`."""

    beams: tuple[Beam, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine can take; None means no limit of its own."""

    max_total_len: int
    max_batch_size: int | None = None
    max_num_beams: int | None = None
    max_input_len: int | None = None
    max_table_rows: int | None = None


class LanguageSession(abc.ABC):
    """OPT, whatever runs it. Engines implement `_generate`; callers use `generate`.

    An engine split over several GPUs has one process a GPU. Each opens the session; then
    `takes_requests` says whether this process has to call `generate` too, or only lends its GPU to
    what rank 0 asks, `is_leader` which one of them has the answers to show, and `is_in_step` whether
    all of them must call it alike. `has_rows` says whether requests can come and go between steps.
    """

    device: torch.device
    vocab_size: int
    hidden_size: int
    limits: Limits
    takes_requests: bool = True
    is_leader: bool = True
    is_in_step: bool = False
    has_rows: bool = False

    def has_scores(self, options: GenerationOptions) -> bool:  # noqa: ARG002 - most engines always
        """Whether answers come with `log_prob`."""
        return True

    @abc.abstractmethod
    def load(self) -> None:
        """Load what opening the session left on disk; `generate` does so too. Again: does nothing.

        Opening reads descriptions, so that what does not fit together is refused before weights are
        read; loading comes last, when it is known how much of the GPU the other engines leave free.

        Raises:
            Blip2Error: the weights are damaged, or cannot be read.
        """

    def prepare(  # noqa: B027 - most engines have nothing to prepare
        self, lengths: Sequence[int], table_rows: int, options: GenerationOptions
    ) -> None:
        """Have what such requests need compiled; `generate` waits for it, or does so itself.

        Args:
            lengths: of each request's input_ids.
            table_rows: of each request's part of the prompt table.
            options: how to decode.
        """

    def halve_batch(self, size: int) -> int:
        """From now on work with half of what was too much of a batch of `size`; return how many.

        What larger ones needed is let go.
        """
        half = max(1, min(size, self.limits.max_batch_size or size) // 2)
        self.limits = dataclasses.replace(self.limits, max_batch_size=half)
        return half

    def lend(self) -> NoReturn:
        """Work for rank 0 until it has closed, then end this process, which takes no requests.

        Raises:
            SystemExit: always.
        """
        self.load()
        self.close()
        raise SystemExit(0)

    def close(self) -> None:  # noqa: B027 - most engines need no more than to be forgotten
        """Let the engine go. A process that takes no requests works on until rank 0 has closed."""

    def generate(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
    ) -> list[Generation]:
        """Answer every request; larger batches than the engine takes are split.

        Args:
            input_ids: one 1-D integer tensor a request, lengths may differ; an id of
                vocab_size + r stands for row r of that request's part of the prompt table.
            prompt_table: requests x n x hidden_size, floating point.
            options: how to decode, the same for every request.

        Raises:
            Blip2Error: something exceeds a limit; raised before any work is done.
        """
        self.check(input_ids, prompt_table, options)
        size = self.limits.max_batch_size or max(len(input_ids), 1)
        generations: list[Generation] = []
        for start in range(0, len(input_ids), size):
            batch = slice(start, start + size)
            generations += self._generate(input_ids[batch], prompt_table[batch], options, start)
        return generations

    def open_rows(self, capacity: int, prompt_len: int, max_output_len: int) -> Rows:
        """Rows that requests take and leave between steps, of an engine that has some.

        Args:
            capacity: rows, at most; fewer where memory does not suffice.
            prompt_len: input_ids of a request that they have to hold, and
            max_output_len: its new tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    @abc.abstractmethod
    def _generate(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
        first_request: int,
    ) -> list[Generation]:
        """As `generate`, for one batch within the limits that starts at request `first_request`."""

    def check(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
    ) -> None:
        """See that the engine can take what `generate` would; of the table only its shape counts.

        Raises:
            Blip2Error: something exceeds a limit.
        """
        limits, rows = self.limits, prompt_table.shape[1]
        if prompt_table.ndim != 3 or prompt_table.shape[0] != len(input_ids):
            raise Blip2Error(
                f"the prompt table has shape {tuple(prompt_table.shape)} for {len(input_ids)}"
                " requests",
                "it must be requests x rows x hidden size",
            )
        if prompt_table.shape[2] != self.hidden_size:
            raise Blip2Error(
                f"the Q-Former's output has hidden size {prompt_table.shape[2]}, this OPT has"
                f" {self.hidden_size}",
                "use the OPT that belongs to the exported BLIP-2 checkpoint",
            )
        longest = max((len(ids) for ids in input_ids), default=0)
        for what, value, limit in (
            ("`num_beams`", options.num_beams, limits.max_num_beams),
            ("query tokens an image", rows, limits.max_table_rows),
            ("input length", longest, limits.max_input_len),
            (
                f"input length {longest} + `max_output_len` {options.max_output_len}",
                longest + options.max_output_len,
                limits.max_total_len,
            ),
        ):
            if limit is not None and value > limit:
                raise Blip2Error(
                    f"{what} is {value}, this OPT engine takes at most {limit}",
                    "lower it or use an engine with higher limits",
                )
        for ids in input_ids:
            if ids.ndim != 1 or not len(ids):
                raise Blip2Error("a request's input_ids must be a 1-D tensor of at least one id")
            if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size + rows:
                raise Blip2Error(
                    f"token id {int(ids.max())} exceeds this OPT's vocabulary of {self.vocab_size}"
                    f" and {rows} image rows",
                    "use the tokenizer exported with the checkpoint",
                )

"""Requests that share OPT's steps: each has rows of one cache, its own options and its own length.

    rows = Rows(model, device, capacity=64, max_len=256, max_new=64)
    chosen = rows.admit([Admission(key, input_ids, table, options)])    # their first tokens
    chosen = rows.step()                                  # every row's next one: queued, not waited for
    for news in chosen.read(): ...                        # news.key, news.tokens, news.log_probs
    rows.release([key])

A request's rows are side by side, and all rows in use come first: a step is taken for as many rows
as the smallest prepared number that holds them. What leaves a hole is filled from the end, by
copying: some 100 µs for what took a hundred steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from blip2.devices import sent
from blip2.gpu.kernel_launch import compile_ahead
from blip2.language.decoding import RULED_OUT, Strategy
from blip2.language.sampling import sampling_settings, uniforms
from blip2.language.session import Generation, GenerationOptions

if TYPE_CHECKING:
    from blip2.language.native.model import OPTModel

BEAMS, NOT_FINITE = -1, -2  # in place of a token

_MULTIPLE = 8  # of the rows of a step, above it


@dataclasses.dataclass(frozen=True)
class Admission:
    """A request to begin: `table` is its n x hidden_size, `key` what it is called by."""

    key: Hashable
    input_ids: torch.Tensor
    table: torch.Tensor
    options: GenerationOptions
    number: int = 0  # among the requests that share its seed


def prepared_rows(rows: int) -> int:
    """The number of rows that a step of so many is taken for: 1, 2, 4 or a multiple of 8."""
    if rows <= _MULTIPLE:
        return 1 << (rows - 1).bit_length()
    return -(-rows // _MULTIPLE) * _MULTIPLE


@dataclasses.dataclass
class _Request:
    key: Hashable
    first: int  # row
    options: GenerationOptions
    strategy: Strategy | None  # of a beam search

    @property
    def count(self) -> int:
        return self.options.rows

    @property
    def rows(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def samples(self) -> bool:
        """Whether its tokens are drawn here: what a beam search does is its strategy's."""
        return self.strategy is None and self.options.samples

    @property
    def is_penalised(self) -> bool:
        """Whether its scores are, for what they repeat; as above."""
        return self.strategy is None and self.options.repetition_penalty != 1

    @property
    def is_held(self) -> bool:
        """Whether it must not end yet, perhaps; as above."""
        return self.strategy is None and self.options.is_held


class Rows:
    """The rows of a model's cache, and who has them. Not for several threads."""

    def __init__(
        self, model: OPTModel, device: torch.device, capacity: int, max_len: int, max_new: int
    ) -> None:
        """Make an empty cache.

        Args:
            model: OPT.
            device: that it computes on.
            capacity: rows at once.
            max_len: tokens of a row, prompt and answer.
            max_new: tokens of an answer, at most.
        """
        self.capacity, self.max_len, self.max_new = capacity, max_len, max_new
        self._model, self._device = model, device
        self._vocab_size = model.config.vocab_size
        self._pool = model.new_pool(capacity, max_len, device)
        self._requests: dict[Hashable, _Request] = {}

        def state(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((capacity, *shape), dtype=dtype, device=device)

        # What the next token of a row is chosen by, and that token.
        self._tokens = state(dtype=torch.int64)
        self._steps = state(dtype=torch.int64)
        self._settings = state(4, dtype=torch.float64)
        self._holds = state(2, dtype=torch.int64)  # the fewest tokens, and the end's
        self._uniforms = state(max_new, dtype=torch.float64)
        self._seen: torch.Tensor | None = None  # rows x vocab_size, made when a penalty asks for it
        self._states = [self._tokens, self._steps, self._settings, self._holds, self._uniforms]
        self._sampled: torch.Tensor | None = None  # rows whose tokens are drawn

    @property
    def used(self) -> int:
        """Rows that requests have."""
        return sum(request.count for request in self._requests.values())

    @property
    def keys(self) -> list[Hashable]:
        """The requests that have rows."""
        return list(self._requests)

    def fits(self, prompt_len: int, max_output_len: int) -> bool:
        """Whether a prompt and its answer fit into a row, however many are free."""
        return prompt_len + max_output_len <= self.max_len and max_output_len <= self.max_new

    def prepare(self, prompt_len: int, table_rows: int, prompts: int) -> None:
        """Have what so many prompts and the steps of so many rows need compiled, if anything does.

        Nobody may have rows.
        """
        if not self._model.has_kernels:
            return
        prompts = min(prompts, self.capacity)
        ids = torch.zeros(prompts, prompt_len, dtype=torch.int64, device=self._device)
        lengths = torch.full((prompts,), prompt_len, device=self._device)
        tables = torch.zeros(
            prompts, table_rows, self._model.config.hidden_size, device=self._device
        )
        with torch.inference_mode(), compile_ahead():
            logits = self._pool.read(ids, lengths, tables, [(row, 1) for row in range(prompts)])
            self._model.log_probs(logits, self._model.likeliest(logits)[0])
            if self.capacity > 1:
                self._pool.move_rows(torch.tensor([[1], [0]], device=self._device))
            for count in sorted({prepared_rows(rows) for rows in range(1, prompts + 1)}):
                self._pool.step(self._tokens[: min(count, self.capacity)], count)
            self._pool.forget(0)

    def admit(self, admissions: Sequence[Admission]) -> Chosen:
        """Read prompts into free rows; there have to be enough. Returns their first tokens.

        Where that fails nobody has got rows.
        """
        with torch.inference_mode(), self._model.computing():
            lengths = torch.tensor([len(a.input_ids) for a in admissions])
            ids = pad_sequence([a.input_ids for a in admissions], batch_first=True).long()
            lengths_and_ids = sent(torch.cat([lengths[:, None], ids], dim=1), self._device)
            lengths, ids = lengths_and_ids[:, 0], lengths_and_ids[:, 1:]
            tables = torch.stack([a.table for a in admissions]).to(self._device)
            rows = slice(self.used, self.used + sum(a.options.rows for a in admissions))
            begun = [self._begin(admission) for admission in admissions]
            try:
                places = [(request.first, request.count) for request in begun]
                logits = self._pool.read(ids, lengths, tables, places)
                self._set(rows, begun, admissions)
                self._regroup()
                if rows.stop - rows.start > len(begun):  # all rows of a request begin alike
                    prompts = (n for n, request in enumerate(begun) for _ in range(request.count))
                    logits = logits[self._index(prompts)]
                    for request in begun:
                        if request.strategy is None and request.count > 1:
                            self._share_prompt(request)
                return self._choose(begun, rows, logits)
            except BaseException:
                self.release([request.key for request in begun])
                raise

    def step(self) -> Chosen:
        """Append the token of every row; returns the ones that follow."""
        used = self.used
        with torch.inference_mode(), self._model.computing():
            count = prepared_rows(used) if self._model.has_kernels else used
            count = min(count, self.capacity)
            logits = self._pool.step(self._tokens[:count], used)[:used]
            return self._choose(list(self._requests.values()), slice(0, used), logits)

    def release(self, keys: Iterable[Hashable]) -> None:
        """Take requests' rows back; unknown ones do no harm."""
        gone = [key for key in keys if self._requests.pop(key, None) is not None]
        if not gone:
            return
        used = self.used
        staying = sorted(self._requests.values(), key=_first)
        with torch.inference_mode():
            if all(request.count == 1 for request in staying):
                holes = set(range(used)) - {request.first for request in staying}
                self._fill(sorted(holes), [r for r in staying if r.first >= used])
            else:  # beams stay together: all move up, in order
                ends = itertools.accumulate((request.count for request in staying), initial=0)
                for request, end in zip(staying, ends, strict=False):
                    if request.first != end:
                        self._move(request, end)
            self._pool.forget(used)
            self._regroup()

    def _fill(self, holes: Sequence[int], behind: Sequence[_Request]) -> None:
        """Let those behind the end, of one row each, lie in the holes before it."""
        if not behind:
            return
        pairs = sent(torch.tensor([[request.first for request in behind], holes]), self._device)
        sources, targets = pairs
        for state in self._states:
            state[targets] = state[sources]
        self._pool.move_rows(pairs)
        for request, hole in zip(behind, holes, strict=True):
            request.first = hole

    def _share_prompt(self, request: _Request) -> None:
        """Let all rows of a request continue its first, where the prompt is."""
        first = torch.zeros(request.count, dtype=torch.int64, device=self._device)
        self._pool.reorder(request.first, request.count, first)

    def _begin(self, admission: Admission) -> _Request:
        options, first = admission.options, self.used
        if first + options.rows > self.capacity:
            raise RuntimeError("admitted without a free row")
        strategy = None
        if options.num_beams > 1:
            ids = [admission.input_ids]
            strategy = self._model.new_strategy(options, ids, admission.number, self._device)
        request = _Request(admission.key, first, options, strategy)
        self._requests[admission.key] = request
        return request

    def _set(self, rows: slice, begun: Sequence[_Request], admissions: Sequence[Admission]) -> None:
        """Fill in the states of new rows, all at once: each is a copy."""
        settings = [
            s for r in begun for s in [sampling_settings(r.options, self._vocab_size)] * r.count
        ]
        self._settings[rows] = sent(torch.tensor(settings, dtype=torch.float64), self._device)
        holds = [h for r in begun for h in [_holds(r.options)] * r.count]
        self._holds[rows] = sent(torch.tensor(holds), self._device)
        self._steps[rows] = 0
        if any(request.samples for request in begun):
            drawn = torch.zeros(len(settings), self.max_new, dtype=torch.float64)
            for request, admission in zip(begun, admissions, strict=True):
                if request.samples:
                    seed, length = request.options.seed, request.options.max_output_len
                    for sequence, row in enumerate(request.rows):
                        numbers = uniforms(seed, admission.number, length, sequence)
                        drawn[row - rows.start, :length] = numbers
            self._uniforms[rows] = sent(drawn, self._device)
        for request, admission in zip(begun, admissions, strict=True):
            if request.is_penalised:
                if self._seen is None:
                    shape = (self.capacity, self._vocab_size)
                    self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
                    self._states.append(self._seen)
                words = admission.input_ids[admission.input_ids < self._vocab_size].long()
                for row in request.rows:
                    self._seen[row] = False
                    self._seen[row, sent(words, self._device)] = True

    def _move(self, request: _Request, first: int) -> None:
        for offset in range(request.count):  # upwards: of overlapping rows none is lost
            for state in self._states:
                state[first + offset] = state[request.first + offset]
        self._pool.move(request.first, first, request.count)
        request.first = first

    def _regroup(self) -> None:
        """Note whose tokens are drawn."""
        sampled = [
            row for request in self._requests.values() if request.samples for row in request.rows
        ]
        self._sampled = self._index(sampled) if sampled else None

    def _choose(self, requests: Sequence[_Request], rows: slice, logits: torch.Tensor) -> Chosen:
        """Choose the next tokens of the rows that some requests have, of their logits."""
        scores = logits
        is_penalised = any(request.is_penalised for request in requests)
        if is_penalised:
            penalty, seen = self._settings[rows, 2, None].float(), self._seen[rows]
            lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen, lowered, scores)
        is_held = any(request.is_held for request in requests)
        if is_held:
            least, ends = self._holds[rows].split(1, dim=1)
            is_early = self._steps[rows, None] < least
            # Not -inf, which would not be finite.
            of_ends = scores.gather(1, ends).masked_fill(is_early, RULED_OUT)
            scores = scores.scatter(1, ends, of_ends)
        chosen = self._model.likeliest(scores)
        tokens = chosen[0]
        places = {request.key: request.first - rows.start for request in requests}
        sampled = [request for request in requests if request.samples]
        if sampled:
            # In a step they are the same as in the last: no list of them is sent to the device.
            are_all = len(requests) == len(self._requests)
            at = (
                self._sampled
                if are_all
                else self._index(row - rows.start for r in sampled for row in r.rows)
            )
            tokens[at] = self._sample(scores[at], at + rows.start)
        if sampled or is_held:
            self._steps[rows] += 1
        ended = {}
        for request in requests:
            if request.strategy is None:
                continue
            at = places[request.key]
            beams = slice(at, at + request.count)
            following, sources = request.strategy.advance(logits[beams].contiguous())
            tokens[beams] = following
            self._pool.reorder(request.first, request.count, sources)
            ended[request.key] = request.strategy.ended()
        self._tokens[rows] = tokens
        if is_penalised:
            self._seen[rows] = self._seen[rows].scatter(1, tokens[:, None], True)
        return Chosen(
            [(r.key, places[r.key], r.count) for r in requests],
            chosen,
            self._model.log_probs(logits, tokens),
            ended,
            {r.key: r.strategy for r in requests if r.strategy is not None},
        )

    def _index(self, numbers: Iterable[int]) -> torch.Tensor:
        return sent(torch.tensor(list(numbers)), self._device)

    def _sample(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        drawn = self._uniforms[rows].gather(1, self._steps[rows, None]).squeeze(1)
        return self._model.draw_tokens(scores, self._settings[rows], drawn)


def _first(request: _Request) -> int:
    return request.first


def _holds(options: GenerationOptions) -> tuple[int, int]:
    """The tokens before which a row does not end, and the end's."""
    return (options.min_output_len, options.end_id) if options.is_held else (0, 0)


class News(NamedTuple):
    """What a request has got: a token of each of its rows, and the token's log probability.

    A request with beams has BEAMS for a token, one whose logits are NaN or Inf NOT_FINITE;
    `has_ended` says whether its beams have.
    """

    key: Hashable
    tokens: list[int]
    log_probs: list[float]
    has_ended: bool


class Chosen:
    """Tokens on their way to the host."""

    def __init__(
        self,
        places: list[tuple[Hashable, int, int]],
        chosen: torch.Tensor,
        log_probs: torch.Tensor,
        ended: dict[Hashable, torch.Tensor],
        strategies: dict[Hashable, Strategy],
    ) -> None:
        self.keys = [key for key, _, _ in places]
        self.last: set[Hashable] = set()  # those whose last token this is, noted by the caller
        self._places, self._strategies = places, strategies
        self._copy = chosen.to("cpu", non_blocking=True, copy=True)
        self._log_probs = log_probs.to("cpu", non_blocking=True, copy=True)
        self._ended = {
            key: flag.to("cpu", non_blocking=True, copy=True) for key, flag in ended.items()
        }
        self._arrived = torch.cuda.Event() if chosen.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> None:
        """Wait until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def read(self) -> Iterator[News]:
        """What each request has got; waits for the device."""
        self.wait()
        tokens, finite = self._copy.tolist()
        log_probs = self._log_probs.tolist()
        for key, at, count in self._places:
            rows = slice(at, at + count)
            if not all(finite[rows]):
                yield News(key, [NOT_FINITE], [], True)
            elif key in self._ended:
                yield News(key, [BEAMS], [], bool(self._ended[key].all()))
            else:
                yield News(key, tokens[rows], log_probs[rows], False)

    def result(self, key: Hashable) -> Generation:
        """What a request with beams has found so far, or at its end; waits for the device.

        Raises:
            FloatingPointError: its logits were NaN or Inf, maybe in a step begun since.
        """
        [generation] = self._strategies[key].results()
        return generation

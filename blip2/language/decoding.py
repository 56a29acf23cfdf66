"""Greedy search, sampling and beam search with the results of Hugging Face's `generate`.

    strategy = make_strategy(options, input_ids, vocab_size)
    logits = prompt logits, one row a request, repeated for its beams
    for _ in range(options.max_output_len):
        next_tokens, source_rows = strategy.advance(logits)
        if strategy.ended().all():               # waits for the device, as what follows the loop does
            break
        logits = logits after next_tokens, on top of the cache rows source_rows
    generations = strategy.results()

`advance` has no step argument and no branch that depends on data: its state, the step included,
lies in tensors of fixed shape that are updated in place, so a GPU can run it inside a captured
graph. Steps taken after everything has ended change no result; `ended` may therefore be read late.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch

from blip2.devices import fetched, sent
from blip2.language.sampling import draw_tokens, sampling_settings, uniforms
from blip2.language.session import Beam, Generation, GenerationOptions

# What transformers adds to a score to rule a candidate out; kept, so that scores agree exactly.
RULED_OUT = -1.0e9


def make_strategy(
    options: GenerationOptions,
    input_ids: Sequence[torch.Tensor],
    vocab_size: int,
    first_request: int = 0,
    device: torch.device | str = "cpu",
) -> Strategy:
    """Choose the strategy that the options ask for.

    Args:
        options: how to decode.
        input_ids: one 1-D tensor a request; ids of vocab_size and above are image rows.
        vocab_size: columns of the logits.
        first_request: index of input_ids[0] among all requests; sampling seeds depend on it.
        device: where the logits will be.
    """
    if options.num_beams > 1:
        return BeamSearch(options, input_ids, vocab_size, device)
    if options.samples:
        return Sampling(options, input_ids, vocab_size, device, first_request)
    return Greedy(options, input_ids, vocab_size, device)


class Strategy(abc.ABC):
    """Turns logits into tokens, step by step. Rows are requests x beams, beams side by side."""

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self.options = options
        self.requests = len(input_ids)
        self.rows = self.requests * options.rows
        self.device = device
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._tokens = torch.full(
            (self.rows, options.max_output_len), options.pad_id, dtype=torch.int64, device=device
        )
        self._penalty = RepetitionPenalty(options, input_ids, vocab_size, device)
        self._hold = HoldBack(options)
        self._stop = StopStates(options, self.rows, device)
        # Of all logits: NaN or Inf in one of them stays. A sum a row, so that rows can be separate.
        self._sums = torch.zeros(self.rows, device=device)

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose each row's next token from logits of shape rows x vocab_size.

        Returns the tokens (rows, int64) and the rows they continue (rows, int64), or None where
        every row continues itself.
        """
        logits = logits.float()
        self._sums += logits.sum(dim=1)
        return self._advance(logits)

    @abc.abstractmethod
    def _advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `advance`, for float32."""

    @abc.abstractmethod
    def ended(self) -> torch.Tensor:
        """Flags on the device: once all are set, no further step can change a result."""

    def finite_rows(self) -> torch.Tensor:
        """Flags on the device: of each row, whether no logits were NaN or Inf."""
        return torch.isfinite(self._sums)

    @abc.abstractmethod
    def results(self) -> list[Generation]:
        """One generation a request, cut before the end token. Waits for the device.

        Raises:
            FloatingPointError: logits were NaN or Inf.
        """

    def _fetched(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors on the host, in one wait with what says whether all logits were numbers."""
        sums, *copies = fetched(self._sums, *tensors)
        if not torch.isfinite(sums).all():
            raise FloatingPointError("logits are NaN or Inf")
        return copies


class Greedy(Strategy):
    """The likeliest token at every step."""

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        super().__init__(options, input_ids, vocab_size, device)
        self._ended = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self._log_probs = torch.zeros(self.rows, device=device)  # of the answer's tokens so far

    def _advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        chosen = self._choose(self._hold.apply(self._penalty.apply(logits), self._step))
        self._log_probs += log_probs(logits, chosen).masked_fill(self._ended, 0)
        next_tokens = torch.where(self._ended, self.options.pad_id, chosen)
        self._tokens.index_copy_(1, self._step, next_tokens[:, None])
        self._ended |= (next_tokens == self.options.end_id) | self._stop.advance(next_tokens)
        self._penalty.add(next_tokens)
        self._step += 1
        return next_tokens, None

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.argmax(dim=-1)

    def ended(self) -> torch.Tensor:
        return self._ended

    def results(self) -> list[Generation]:
        steps, tokens, log_probs = self._fetched(self._step, self._tokens, self._log_probs)
        rows = tokens[:, : int(steps)].tolist()
        beams = [
            Beam.cut(ids, self.options, log_prob)
            for ids, log_prob in zip(rows, log_probs.tolist(), strict=True)
        ]
        count = self.options.rows
        return [Generation(tuple(beams[at : at + count])) for at in range(0, len(beams), count)]


class Sampling(Greedy):
    """A token drawn from the distribution that temperature, top_k and top_p leave.

    Each request has its own random numbers, drawn beforehand, one a step; a number picks a token
    by inverting the cumulative distribution in the order of the vocabulary. So an answer depends
    on the seed, the request's index and its own among those of the request, not on what else is in
    its batch.
    """

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device | str,
        first_request: int = 0,
    ) -> None:
        super().__init__(options, input_ids, vocab_size, device)
        requests = range(first_request, first_request + self.requests)
        drawn = [
            uniforms(options.seed, index, options.max_output_len, sequence)
            for index in requests
            for sequence in range(options.rows)
        ]
        self._uniforms = sent(torch.stack(drawn), device)
        settings = torch.tensor([sampling_settings(options, vocab_size)], dtype=torch.float64)
        self._settings = sent(settings.repeat(self.rows, 1), device)

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        drawn = self._uniforms.index_select(1, self._step).squeeze(1)
        return self._draw(scores, self._settings, drawn)

    def _draw(
        self, scores: torch.Tensor, settings: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        return draw_tokens(scores, settings, drawn)


class BeamSearch(Strategy):
    """The search of transformers' `_beam_search`: same candidates, same scores, same stopping.

    Instead of whole sequences, each step stores the running beams' tokens and parents, and a
    finished beam stores (step, parent, last token); `results` walks back from there.
    """

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        super().__init__(options, input_ids, vocab_size, device)
        shape = (self.requests, options.num_beams)
        self._parents = torch.zeros_like(self._tokens)
        self._first_row = torch.arange(0, self.rows, options.num_beams, device=device)[:, None]
        # All beams of a request start equal: only the first may propose tokens at the first step.
        self._running_scores = torch.zeros(shape, device=device)
        self._running_scores[:, 1:] = RULED_OUT
        self._scores = torch.full(shape, RULED_OUT, device=device)
        self._endings = torch.zeros((*shape, 3), dtype=torch.int64, device=device)
        self._is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        self._can_improve = torch.ones((self.requests, 1), dtype=torch.bool, device=device)
        lengths = torch.arange(1, options.max_output_len + 1, dtype=torch.float64)
        self._norms = sent((lengths**options.length_penalty).float(), device)
        # Twice the beams are kept, as each beam can end in one way: that many always go on.
        self._may_finish = torch.arange(2 * options.num_beams, device=device) < options.num_beams

    def _advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_beams, vocab_size = self.options.num_beams, logits.shape[-1]
        log_probs = self._penalty.apply(logits.log_softmax(dim=-1))
        log_probs = self._hold.apply(log_probs, self._step)
        totals = log_probs.view(self.requests, num_beams, -1) + self._running_scores[:, :, None]
        scores, flat = totals.view(self.requests, -1).topk(2 * num_beams)
        parents, tokens = flat // vocab_size, flat % vocab_size
        last_step = self._step == self.options.max_output_len - 1
        ends = (tokens == self.options.end_id) | last_step
        ends |= self._stop.would_end((parents + self._first_row).view(-1), tokens.view(-1)).view_as(
            ends
        )
        norm = self._norms.index_select(0, self._step)

        self._collect_finished(scores / norm, parents, tokens, ends)
        running = scores + ends.float() * RULED_OUT
        best = running.topk(num_beams).indices
        self._running_scores.copy_(running.gather(1, best))
        self._stop_where_hopeless(norm)

        next_tokens = tokens.gather(1, best).view(-1)
        source_rows = (parents.gather(1, best) + self._first_row).view(-1)
        self._tokens.index_copy_(1, self._step, next_tokens[:, None])
        self._parents.index_copy_(1, self._step, source_rows[:, None])
        self._penalty.reorder(source_rows)
        self._penalty.add(next_tokens)
        self._stop.reorder(source_rows)
        self._stop.advance(next_tokens)
        self._step += 1
        return next_tokens, source_rows

    def _collect_finished(
        self,
        scores: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
        ends: torch.Tensor,
    ) -> None:
        """Merge candidates that just ended into the finished beams, best `num_beams` first."""
        just_finished = ends & self._may_finish
        closed = ~self._can_improve
        if self.options.early_stopping:
            closed = closed.float() + self._is_finished.all(dim=1, keepdim=True).float()
        scores = scores + closed * RULED_OUT + ~just_finished * RULED_OUT
        step = self._step.expand_as(tokens)
        endings = torch.stack((step, parents + self._first_row, tokens), dim=-1)

        merged = torch.cat((self._scores, scores), dim=1)
        kept_scores, kept = merged.topk(self.options.num_beams)
        flags = torch.cat((self._is_finished, just_finished), dim=1)
        endings = torch.cat((self._endings, endings), dim=1)
        self._scores.copy_(kept_scores)
        self._is_finished.copy_(flags.gather(1, kept))
        self._endings.copy_(endings.gather(1, kept[:, :, None].expand(-1, -1, 3)))

    def _stop_where_hopeless(self, norm: torch.Tensor) -> None:
        """Mark requests whose best running beam no longer beats their worst finished one."""
        best_running = self._running_scores[:, :1] / norm
        worst = self._scores.min(dim=1, keepdim=True).values
        worst = torch.where(self._is_finished, worst, RULED_OUT)
        self._can_improve &= (best_running > worst).any(dim=1, keepdim=True)

    def ended(self) -> torch.Tensor:
        hopeless = ~self._can_improve
        return hopeless | self._is_finished.all() if self.options.early_stopping else hopeless

    def results(self) -> list[Generation]:
        own = (self._tokens, self._parents, self._scores, self._endings)
        tokens, parents, scores, endings = (copy.tolist() for copy in self._fetched(*own))
        kept = self.options.sequences

        def beam(score: float, ending: list[int]) -> Beam:
            step, row, last_token = ending
            ids = [last_token]
            for earlier in range(step - 1, -1, -1):
                ids.append(tokens[row][earlier])
                row = parents[row][earlier]
            return Beam.cut(ids[::-1], self.options).ranked(score, self.options)

        return [
            Generation(tuple(map(beam, of_request[:kept], ends[:kept])))
            for of_request, ends in zip(scores, endings, strict=True)
        ]


class RepetitionPenalty:
    """Makes the tokens of a request's text and of its answer so far less likely (CTRL, 2019).

    Positive scores are divided by the penalty, negative ones multiplied. Image rows do not count.
    """

    def __init__(
        self,
        options: GenerationOptions,
        input_ids: Sequence[torch.Tensor],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self.penalty = options.repetition_penalty
        self._seen: torch.Tensor | None = None
        if self.penalty != 1:
            seen = torch.zeros(len(input_ids), vocab_size, dtype=torch.bool)
            for row, ids in zip(seen, input_ids, strict=True):
                row[ids[ids < vocab_size].long().cpu()] = True
            self._seen = sent(seen.repeat_interleave(options.rows, dim=0), device)

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores, rows x vocab_size, with those of seen tokens lowered."""
        if self._seen is None:
            return scores
        lowered = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(self._seen, lowered, scores)

    def add(self, tokens: torch.Tensor) -> None:
        """Remember each row's new token."""
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)

    def reorder(self, source_rows: torch.Tensor) -> None:
        """Let each row continue what another row has seen."""
        if self._seen is not None:
            self._seen.copy_(self._seen.index_select(0, source_rows))


class HoldBack:
    """Rules the end token out of the first `min_output_len` tokens."""

    def __init__(self, options: GenerationOptions) -> None:
        self._end_id = options.end_id
        self._least = options.min_output_len if options.is_held else 0

    def apply(self, scores: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Scores, rows x vocab_size, the end's -inf while it is too early for it.

        `step` is how many tokens there are, one number or one of each row.
        """
        if not self._least:
            return scores
        held = scores.clone()
        held[:, self._end_id].masked_fill_(step < self._least, -torch.inf)
        return held


class StopStates:
    """How much of a stop text each row has said."""

    def __init__(self, options: GenerationOptions, rows: int, device: torch.device | str) -> None:
        self._stop = options.stop
        if self._stop is not None:
            self._table = sent(self._stop.table, device)
            self._states = torch.zeros(rows, dtype=torch.int64, device=device)

    def would_end(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens would complete a text behind what their rows have said; both are 1-D."""
        if self._stop is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return self._table[self._states[rows], tokens] == self._stop.found

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Remember each row's new token; says which have completed a text by now."""
        if self._stop is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        self._states.copy_(self._table[self._states, tokens])
        return self._states == self._stop.found

    def reorder(self, source_rows: torch.Tensor) -> None:
        """Let each row continue what another row has said."""
        if self._stop is not None:
            self._states.copy_(self._states.index_select(0, source_rows))


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What the model makes of each row's token, float32, of its logits, rows x vocab_size.

    As it says them: neither a penalty nor a temperature has changed them.
    """
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]

"""Beam search as two kernels a step, and one that reorders the cache; launched as in `kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def candidates_kernel(
    logits,  # rows x vocab_size, float32
    maxima,  # rows x chunks, float32, as the next two
    exp_sums,  # of exp(logit - maximum)
    sums,  # where NaN and Inf stay
    values,  # rows x chunks x KEPT, float32: the largest logits of each chunk
    columns,  # rows x chunks x KEPT, int32: where in their row they are
    vocab_size,
    KEPT: tl.constexpr,
    PLACES: tl.constexpr,  # KEPT or more
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """What each row's softmax and best candidates need of each chunk of BLOCK logits."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    place = tl.arange(0, PLACES)
    column = chunk * BLOCK + lane
    inside = column < vocab_size
    best = tl.full((PLACES,), float("-inf"), tl.float32)
    where = tl.zeros((PLACES,), tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logit = tl.load(logits + row * vocab_size + column, mask=inside, other=float("-inf"))
    at = row * tl.num_programs(1) + chunk
    maximum = tl.max(logit, axis=0)
    tl.store(maxima + at, maximum)
    tl.store(exp_sums + at, tl.sum(tl.exp(logit - maximum), axis=0))
    tl.store(sums + at, tl.sum(tl.where(inside, logit, 0.0), axis=0))
    for rank in range(KEPT):
        value, winner = tl.max(
            logit, axis=0, return_indices=True, return_indices_tie_break_left=True
        )
        best = tl.where(place == rank, value, best)
        where = tl.where(place == rank, winner, where)
        logit = tl.where(lane == winner, float("-inf"), logit)
    # With NaN any lane may win: whatever is chosen then has to be a token.
    where = tl.minimum(chunk * BLOCK + where, vocab_size - 1)
    tl.store(values + at * KEPT + place, best, mask=place < KEPT)
    tl.store(columns + at * KEPT + place, where, mask=place < KEPT)


@triton.jit
def _ranks(scores, place):
    """How many scores come before each: higher ones, and equal ones of an earlier place."""
    tied = (scores[None, :] == scores[:, None]) & (place[None, :] < place[:, None])
    return tl.sum(((scores[None, :] > scores[:, None]) | tied).to(tl.int32), axis=1)


@triton.jit
def beams_kernel(
    maxima,  # the first five are what candidates_kernel has written
    exp_sums,
    chunk_sums,
    values,
    columns,
    norms,  # max_tokens, float32: what a beam that ends at a step divides its score by
    running_scores,  # requests x NUM_BEAMS, float32
    scores,  # requests x NUM_BEAMS, float32: of finished beams, as the next two
    endings,  # requests x NUM_BEAMS x 3, int64: step, parent's row, last token
    is_finished,  # requests x NUM_BEAMS, bool
    can_improve,  # requests, bool
    hopeless,  # requests, bool: the opposite
    tokens,  # rows x max_tokens, int64
    parents,  # rows x max_tokens, int64
    steps,  # requests, int64
    sums,  # rows, float32: of all logits so far
    next_tokens,  # rows, int64
    source_rows,  # rows, int64
    chunks,
    max_tokens,
    end_id,
    NUM_BEAMS: tl.constexpr,
    EARLY_STOPPING: tl.constexpr,
    RULED_OUT: tl.constexpr,
    BEAMS: tl.constexpr,  # NUM_BEAMS or more
    PLACES: tl.constexpr,  # 2 * NUM_BEAMS or more
    CHUNKS: tl.constexpr,  # chunks or more
    CANDIDATES: tl.constexpr,  # a row's: chunks * 2 * NUM_BEAMS or more
    PDL: tl.constexpr,
):
    """A request's step of `BeamSearch`, by whose names things go here."""
    KEPT: tl.constexpr = 2 * NUM_BEAMS
    request = tl.program_id(0).to(tl.int64)
    first_row = request * NUM_BEAMS
    beam = tl.arange(0, BEAMS)
    place = tl.arange(0, PLACES)
    chunk = tl.arange(0, CHUNKS)
    candidate = tl.arange(0, CANDIDATES)
    lane = tl.arange(0, BEAMS * CANDIDATES)
    is_beam = beam < NUM_BEAMS
    is_kept = place < KEPT
    row = first_row + beam
    candidates = chunks * KEPT
    score = tl.full((PLACES,), float("-inf"), tl.float32)
    origin = tl.zeros((PLACES,), tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    step = tl.load(steps + request)
    norm = tl.load(norms + step)
    could_improve = tl.load(can_improve + request)
    running = tl.load(running_scores + row, mask=is_beam, other=0.0)
    old_score = tl.load(scores + row, mask=is_beam, other=float("-inf"))
    old_finished = tl.load(is_finished + row, mask=is_beam, other=1).to(tl.int32)
    old_step = tl.load(endings + row * 3, mask=is_beam, other=0)
    old_parent = tl.load(endings + row * 3 + 1, mask=is_beam, other=0)
    old_token = tl.load(endings + row * 3 + 2, mask=is_beam, other=0)

    inside = is_beam[:, None] & (chunk < chunks)[None, :]
    at = row[:, None] * chunks + chunk[None, :]
    maximum = tl.load(maxima + at, mask=inside, other=-1e30)
    exp_sum = tl.load(exp_sums + at, mask=inside, other=1.0)
    highest = tl.max(maximum, axis=1)
    log_sum = tl.log(tl.sum(exp_sum * tl.exp(maximum - highest[:, None]), axis=1))
    new_sum = tl.sum(tl.load(chunk_sums + at, mask=inside, other=0.0), axis=1)
    new_sum += tl.load(sums + row, mask=is_beam, other=0.0)

    inside = is_beam[:, None] & (candidate < candidates)[None, :]
    at = row[:, None] * candidates + candidate[None, :]
    logit = tl.load(values + at, mask=inside, other=float("-inf"))
    total = logit - highest[:, None] - log_sum[:, None] + running[:, None]
    total = total.reshape(BEAMS * CANDIDATES)
    for rank in range(KEPT):
        value, winner = tl.max(
            total, axis=0, return_indices=True, return_indices_tie_break_left=True
        )
        score = tl.where(place == rank, value, score)
        origin = tl.where(place == rank, winner, origin)
        total = tl.where(lane == winner, float("-inf"), total)
    # With NaN any lane may win: what is read then has to be a candidate.
    parent = first_row + tl.minimum(origin // CANDIDATES, NUM_BEAMS - 1)
    at = parent * candidates + tl.minimum(origin % CANDIDATES, candidates - 1)
    token = tl.load(columns + at).to(tl.int64)
    ends = (token == end_id) | (step == max_tokens - 1)

    # Candidates that just ended are merged into the finished beams.
    just_finished = ends & (place < NUM_BEAMS)
    closed = tl.where(could_improve, 0.0, RULED_OUT)
    if EARLY_STOPPING:
        closed += tl.where(tl.min(old_finished, axis=0) == 1, RULED_OUT, 0.0)
    new_score = tl.div_rn(score, norm) + closed + tl.where(just_finished, 0.0, RULED_OUT)
    new_score = tl.where(is_kept, new_score, float("-inf"))
    old_rank = _ranks(old_score, beam)
    old_rank += tl.sum((new_score[None, :] > old_score[:, None]).to(tl.int32), axis=1)
    new_rank = _ranks(new_score, place)
    new_rank += tl.sum((old_score[None, :] >= new_score[:, None]).to(tl.int32), axis=1)
    stays = is_beam & (old_rank < NUM_BEAMS)
    enters = is_kept & (new_rank < NUM_BEAMS)

    # The others go on, at the last step those that end too.
    running = tl.where(is_kept, score + tl.where(ends, RULED_OUT, 0.0), float("-inf"))
    running_rank = _ranks(running, place)
    goes_on = is_kept & (running_rank < NUM_BEAMS)

    # Hopeless is a request whose best running beam does not beat its worst finished one.
    best = tl.div_rn(tl.max(running, axis=0), norm)
    worst = tl.minimum(
        tl.min(tl.where(stays, old_score, float("inf")), axis=0),
        tl.min(tl.where(enters, new_score, float("inf")), axis=0),
    )
    beats_old = stays & (best > tl.where(old_finished == 1, worst, RULED_OUT))
    beats_new = enters & (best > tl.where(just_finished, worst, RULED_OUT))
    beats = tl.max(beats_old.to(tl.int32), axis=0) + tl.max(beats_new.to(tl.int32), axis=0)
    improves = could_improve & (beats > 0)

    # Threads store where others have loaded.
    tl.debug_barrier()
    tl.store(steps + request, step + 1)
    tl.store(can_improve + request, improves)
    tl.store(hopeless + request, improves == 0)
    tl.store(sums + row, new_sum, mask=is_beam)
    at = first_row + old_rank
    tl.store(scores + at, old_score, mask=stays)
    tl.store(is_finished + at, old_finished == 1, mask=stays)
    tl.store(endings + at * 3, old_step, mask=stays)
    tl.store(endings + at * 3 + 1, old_parent, mask=stays)
    tl.store(endings + at * 3 + 2, old_token, mask=stays)
    at = first_row + new_rank
    tl.store(scores + at, new_score, mask=enters)
    tl.store(is_finished + at, just_finished, mask=enters)
    tl.store(endings + at * 3, step, mask=enters)
    tl.store(endings + at * 3 + 1, parent, mask=enters)
    tl.store(endings + at * 3 + 2, token, mask=enters)
    at = first_row + running_rank
    tl.store(running_scores + at, running, mask=goes_on)
    tl.store(next_tokens + at, token, mask=goes_on)
    tl.store(source_rows + at, parent, mask=goes_on)
    tl.store(tokens + at * max_tokens + step, token, mask=goes_on)
    tl.store(parents + at * max_tokens + step, parent, mask=goes_on)


@triton.jit
def reorder_kernel(
    sources,  # rows x max_len, int32
    source_rows,  # rows, int64, each of the same request
    lengths,  # rows, int64
    num_beams,
    max_len,
    BEAMS: tl.constexpr,  # num_beams or more
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """sources[row] = sources[source_rows[row]] as far as the row is filled, then the row itself."""
    beam = tl.arange(0, BEAMS)
    is_beam = beam < num_beams
    row = tl.program_id(0).to(tl.int64) * num_beams + beam
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = is_beam[:, None] & (slot < max_len)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    source = tl.load(source_rows + row, mask=is_beam, other=0)
    length = tl.load(lengths + row, mask=is_beam, other=0)
    inherited = tl.load(sources + source[:, None] * max_len + slot[None, :], mask=inside, other=0)
    entry = tl.where(slot[None, :] < length[:, None], inherited, row[:, None].to(tl.int32))
    tl.debug_barrier()  # threads store where others have loaded
    tl.store(sources + row[:, None] * max_len + slot[None, :], entry, mask=inside)

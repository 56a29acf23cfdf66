"""OPT on a GPU as a whole, prompts and steps, against float64: logits and what the cache holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from exact import (
    HALF,
    ExactOPT,
    drawing,
    fill_free_memory_with_nan,
    opt_config,
    random_opt,
    relative_error,
)

from blip2.language.native.checkpoint import OPTWeights
from blip2.language.native.cuda import CudaModel
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.fused_step import macros_for

STEPS, IMAGE_ROWS, LONGEST = 3, 32, 50

OPT_125M, OPT_2_7B, OPT_6_7B = (768, 12), (2560, 32), (4096, 32)
# Width, heads and bits, and with them some numbers of requests and of beams.
CASES = {
    (*OPT_125M, None): [(1, 1), (64, 1)],
    (*OPT_125M, 8): [(3, 1)],
    (*OPT_125M, 4): [(8, 5)],
    (*OPT_2_7B, None): [(1, 1), (3, 1), (8, 1), (1, 5), (8, 5), (64, 1)],
    (*OPT_2_7B, 8): [(1, 1), (8, 1), (8, 5)],
    (*OPT_2_7B, 4): [(1, 1), (1, 5), (64, 1)],
    (*OPT_6_7B, None): [(1, 1)],
    (*OPT_6_7B, 8): [(3, 1), (64, 1)],
    (*OPT_6_7B, 4): [(1, 1), (8, 5)],
}


def name_of(value) -> str:
    return f"{value[0]} wide-{value[2] or 16} bits" if isinstance(value, tuple) else str(value)


def on_models(cases: dict[tuple, list[tuple[int, int]]]) -> pytest.MarkDecorator:
    """For each model the numbers of requests and beams."""
    each = [(shape, *sizes) for shape, all_sizes in cases.items() for sizes in all_sizes]
    return pytest.mark.parametrize(
        "models, requests, num_beams", each, indirect=["models"], ids=name_of
    )


@pytest.fixture(scope="module")
def models(request, device) -> tuple[ExactOPT, OPTWeights]:
    width, heads, bits = request.param
    return random_opt(opt_config(width, heads, layers=2), bits, device)


class Texts:
    """Prompts of several lengths behind image features, and what has been appended to each row."""

    def __init__(
        self, exact: ExactOPT, requests: int, num_beams: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(requests)
        vocab_size, width = exact.config.vocab_size, exact.config.hidden_size
        lengths = torch.randint(IMAGE_ROWS + 1, LONGEST + 1, (requests,), generator=generator)
        lengths[-1] = LONGEST
        ids = torch.randint(0, vocab_size, (requests, LONGEST), generator=generator)
        ids[:, :IMAGE_ROWS] = vocab_size + torch.arange(IMAGE_ROWS).flip(0)
        self.exact, self.num_beams = exact, num_beams
        self.lengths, self.ids = lengths.to(device), ids.to(device)
        self.table = drawing(device)(requests, IMAGE_ROWS, width, spread=0.003)
        words = exact.words(self.ids.clamp(max=vocab_size - 1))
        words[:, :IMAGE_ROWS] = self.table.flip(1).double()
        self.x = torch.cat((words, words.new_zeros(requests, STEPS, width)), 1)
        self.x = self.x.repeat_interleave(num_beams, 0)
        self.read = self.lengths.repeat_interleave(num_beams)
        self.rows = torch.arange(len(self.read), device=device)
        # What each step appends, and which row each then continues.
        shape = (STEPS, len(self.read))
        self.tokens = torch.randint(0, vocab_size, shape, generator=generator).to(device)
        beams = torch.randint(0, num_beams, shape, generator=generator).to(device)
        self.source_rows = self.rows // num_beams * num_beams + beams

    def append(self, tokens: torch.Tensor) -> None:
        self.x[self.rows, self.read] = self.exact.words(tokens)
        self.read = self.read + 1

    def truth(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each row's logits, and all keys and values."""
        hidden, keys, values = self.exact.read(self.x)
        return self.exact.logits(hidden[self.rows, self.read - 1]), keys, values


def open_cache(model: CudaModel, texts: Texts) -> CudaCache:
    """For the texts and what is appended to them; it holds NaN."""
    cache = model.new_cache(texts.lengths, texts.num_beams, STEPS + 1)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def run(model: CudaModel, cache: CudaCache, texts: Texts) -> Iterator[torch.Tensor]:
    """The logits behind the prompts (requests) and behind each step (rows)."""
    yield model.prefill(texts.ids, texts.lengths, texts.table.float(), cache)
    for tokens, source_rows in zip(texts.tokens, texts.source_rows, strict=True):
        yield model.step(tokens, cache)
        if texts.num_beams > 1:
            cache.reorder(source_rows)


@on_models(CASES)
def test_prompts_and_steps_equal_float64(models, device, requests, num_beams):
    """In memory that held NaN."""
    exact, packed = models
    texts = Texts(exact, requests, num_beams, device)
    fill_free_memory_with_nan(device)
    model = CudaModel(exact.config, packed)
    cache = open_cache(model, texts)
    for step, logits in enumerate(run(model, cache, texts)):
        if step > 0:
            texts.append(texts.tokens[step - 1])
        truth, keys, values = texts.truth()
        if step == 0:
            truth = truth[::num_beams]
        assert relative_error(logits, truth) < 4 * HALF
        rows = (logits.double() - truth).norm(dim=1) / truth.norm(dim=1)
        assert (rows < 6 * HALF).all()
        if step > 0 and num_beams > 1:
            texts.x = texts.x[texts.source_rows[step - 1]]
    # What a row continues is found by way of the table of sources, as of the last step.
    assert torch.equal(cache.lengths, texts.read)
    slots = torch.arange(cache.max_len, device=device)
    sources = cache.sources.long()
    for found, truth in ((cache.keys, keys), (cache.values, values)):
        if num_beams > 1:
            truth = truth[:, texts.source_rows[-1]]
        read = slots[: truth.shape[3]] < texts.read[:, None]
        for layer, wanted in zip(found, truth, strict=True):
            seen = layer[sources, :, slots][:, : truth.shape[3]]
            assert relative_error(seen[read], wanted.transpose(1, 2)[read]) < 4 * HALF


@on_models({(*OPT_2_7B, None): [(1, 1), (8, 5), (64, 1)], (*OPT_2_7B, 4): [(1, 1), (8, 5)]})
def test_answers_are_the_same_every_time(models, device, requests, num_beams):
    """To the last bit, by one model and by another."""
    exact, packed = models
    texts = Texts(exact, requests, num_beams, device)
    first, second = CudaModel(exact.config, packed), CudaModel(exact.config, packed)
    runs = [
        [logits.clone() for logits in run(model, open_cache(model, texts), texts)]
        for model in (first, first, second)
    ]
    for logits in zip(*runs, strict=True):
        assert logits[0].isfinite().all()
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])


def test_which_shapes_are_one_kernel(device):
    """Of one row, on Hopper and later, all but OPT-125M's."""
    if torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("step.cu is for Hopper and later")
    for (width, heads), fused in ((OPT_125M, False), (OPT_2_7B, True), (OPT_6_7B, True)):
        config = opt_config(width, heads, layers=1, vocab_size=64)
        _, packed = random_opt(config, None, device)
        assert (macros_for(config, packed, 1, device) is not None) == fused
        assert macros_for(config, packed, 2, device) is None

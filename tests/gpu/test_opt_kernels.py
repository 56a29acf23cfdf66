"""The Triton kernels around OPT's linears: embed, norm, prompts' attention, searches."""

from __future__ import annotations

import math

import pytest
import torch
import triton
from exact import HALF, bits_of, drawing, opt_config, relative_error, settle

from blip2.gpu.kernel_launch import launch
from blip2.language.decoding import BeamSearch, Greedy
from blip2.language.native import kernels
from blip2.language.native.checkpoint import Norm
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.cuda_decoding import CudaBeamSearch, CudaGreedy, likeliest
from blip2.language.native.layers import Layers
from blip2.language.session import GenerationOptions

WIDTHS = pytest.mark.parametrize("width", [768, 2560, 4096])


@WIDTHS
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_embed_adds_words_and_positions(device, rows, width):
    draw = drawing(device)
    embedding, positions = draw(1000, width), draw(300, width)
    tokens = torch.randint(0, 1000, (rows,), device=device)
    lengths = torch.randint(0, 300, (rows,), device=device)
    x = torch.full((rows, width), math.nan, device=device)
    launch(
        kernels.embed_kernel,
        (rows, triton.cdiv(width, 1024)),
        tokens,
        lengths,
        embedding,
        positions,
        x,
        width,
        BLOCK=1024,
        device=device,
    )
    assert torch.equal(x, embedding[tokens].float() + positions[lengths].float())


@WIDTHS
@pytest.mark.parametrize("pending", [None, "product", "product and bias", "parts and bias"])
def test_norm_equals_float64(device, width, pending):
    """Of rows whose variance is a tenth, or a hundred times, what is added to it."""
    draw, rows = drawing(device), 50
    layers = Layers(opt_config(width, 1), None, rows, device)
    spread = torch.tensor([1e-3, 0.03], device=device).repeat(rows // 2)[:, None]
    layers.x.copy_(draw(rows, width) * spread + 0.002)
    norm = Norm(1 + draw(width, spread=0.3), draw(width, spread=0.3))
    parts, bias = draw(1, rows, width, spread=1e-3), draw(width, spread=1e-3)
    x = layers.x.double()
    if pending:
        if "parts" in pending:
            parts = draw(3, rows, width, spread=1e-3).float()
        layers._pending = (parts, bias if "bias" in pending else None)
        x = x + parts.double().sum(0) + (bias.double() if "bias" in pending else 0)
    centred = x - x.mean(1, keepdim=True)
    normed = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    settle()
    found = layers._norm(norm)
    assert relative_error(found, normed * norm.weight.double() + norm.bias.double()) < HALF
    assert relative_error(layers.x, x) < 1e-7


@pytest.mark.parametrize("head_size", [8, 64, 80, 128])
@pytest.mark.parametrize("length", [1, 15, 16, 45, 64, 65, 200])
def test_attention_of_prompts_equals_float64(device, length, head_size):
    """Two requests of three beams each: the first beam's rows keep the prompt, the others nothing."""
    requests, num_beams, heads, max_len = 2, 3, 4, 256
    draw = drawing(device, length)
    qkv = draw(requests * length, 3 * heads * head_size, spread=1.4)
    cache = torch.full((2, requests * num_beams, heads, max_len, head_size), math.nan).half()
    keys, values = cache.to(device)
    out = torch.full((requests * length, heads * head_size), math.nan, device=device).half()
    block = 16 if length <= 64 else 64
    launch(
        kernels.prompt_attention_kernel,
        (triton.cdiv(length, block), heads, requests),
        qkv,
        keys,
        values,
        out,
        length,
        num_beams,
        max_len,
        head_size**-0.5,
        D=head_size,
        BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        BLOCK=block,
        num_warps=block // 16 if block > 16 else 2,
        device=device,
    )
    each = qkv.view(requests, length, 3, heads, head_size).permute(2, 0, 3, 1, 4)
    query, key, value = each.double()
    scores = query @ key.transpose(2, 3) * head_size**-0.5
    slots = torch.arange(length, device=device)
    weights = scores.masked_fill(slots > slots[:, None], -math.inf).softmax(-1)
    truth = (weights @ value).transpose(1, 2).flatten(2).flatten(0, 1)
    # The weights of values are rounded to float16 too.
    assert relative_error(out, truth) < 1.5 * HALF
    for kept, wanted in ((keys, each[1]), (values, each[2])):
        expected = torch.full_like(kept, math.nan)
        expected[::num_beams, :, :length] = wanted
        assert torch.equal(bits_of(kept), bits_of(expected))


def test_greedy_search(device):
    """Against the search of several operations, on a CPU: ties, and rows that end."""
    options = GenerationOptions(end_id=7, pad_id=1, max_output_len=9)
    texts = [torch.tensor([3])] * 40
    one_kernel = CudaGreedy(options, texts, 50272, device)
    plain = Greedy(options, texts, 50272, "cpu")
    draw = drawing(device)
    for step in range(9):
        logits = draw(40, 50272).float()
        logits[::2, [100, 308, 8292, 8500, 50271]] = (
            9.0  # the first; the third is a block behind it
        )
        logits[1::2, [50271, 50270]] = 9.0
        logits[step * 4, 7] = 10.0
        tokens = one_kernel.advance(logits)[0].clone()
        expected = plain.advance(logits.cpu())[0]
        assert torch.equal(tokens.cpu(), expected)
        assert {100, 50270} <= set(expected.tolist())
        assert torch.equal(one_kernel.ended().cpu(), plain.ended())
    for found, wanted in zip(one_kernel.results(), plain.results(), strict=True):
        [found], [wanted] = found.beams, wanted.beams
        assert (found.token_ids, found.finished) == (wanted.token_ids, wanted.finished)
        assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-4)
    assert one_kernel.finite_rows().all()


@pytest.mark.parametrize(
    "requests, num_beams, length_penalty, early_stopping",
    [(1, 5, 1.0, False), (8, 5, 1.0, True), (3, 2, -1.0, False), (2, 10, 2.0, True)],
)
def test_beam_search(device, requests, num_beams, length_penalty, early_stopping):
    """Against the search of several operations, in float64; also after requests have ended."""
    options = GenerationOptions(
        end_id=7,
        max_output_len=9,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    texts = [torch.tensor([3])] * requests
    fast = CudaBeamSearch(options, texts, 50272, device)
    plain = BeamSearch(options, texts, 50272, "cpu")
    generator = torch.Generator(device).manual_seed(num_beams)
    for step in range(9):
        logits = 3 * torch.randn(fast.rows, 50272, generator=generator, device=device)
        logits[:, 7] += 10  # then it is often among the best
        # (Of so many columns PyTorch's log_softmax in float32 is off by 3e-5 on a CPU.)
        got, expected = fast.advance(logits), plain._advance(logits.double().cpu())
        if step < 8:  # at the last all running beams tie
            assert torch.equal(got[0].cpu(), expected[0])
            assert torch.equal(got[1].cpu(), expected[1])
        assert torch.equal(fast.ended().cpu(), plain.ended())
    assert fast.finite_rows().all()
    for found, wanted in zip(fast.results(), plain.results(), strict=True):
        assert [b.token_ids for b in found.beams] == [b.token_ids for b in wanted.beams]
        scores = [[b.score for b in side.beams] for side in (found, wanted)]
        assert scores[0] == pytest.approx(scores[1], 1e-5, 1e-5)
    lengths = {len(beam.token_ids) for found in fast.results() for beam in found.beams}
    assert len(lengths) > 1


def test_beams_that_tie_are_taken_in_the_vocabularys_order(device):
    options = GenerationOptions(end_id=7, max_output_len=4, num_beams=3)
    search = CudaBeamSearch(options, [torch.tensor([3])] * 2, 50272, device)
    logits = torch.zeros(6, 50272, device=device)
    logits[:, [50271, 30, 9000, 31, 40000]] = 5.0  # of two requests' first rows: the others wait
    tokens, sources = search.advance(logits)
    assert tokens.tolist() == [30, 31, 9000] * 2
    assert sources.tolist() == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("search", [CudaGreedy, CudaBeamSearch])
def test_nan_and_inf_of_an_early_step_are_remembered(device, search, value):
    options = GenerationOptions(
        end_id=7, max_output_len=3, num_beams=1 if search is CudaGreedy else 5
    )
    for column in (0, 30000, 50271):
        strategy = search(options, [torch.tensor([3])] * 8, 50272, device)
        logits = drawing(device)(strategy.rows, 50272).float()
        strategy.advance(logits)
        assert strategy.finite_rows().all()
        broken = logits.clone()
        broken[strategy.rows // 2, column] = value
        tokens, _ = strategy.advance(broken)
        assert ((tokens >= 0) & (tokens < 50272)).all()
        strategy.advance(logits)
        assert not strategy.finite_rows().all()
        with pytest.raises(FloatingPointError):
            strategy.results()


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_a_beam_takes_over_the_table_of_another(device, num_beams):
    """Of more slots than a program takes, as far as they are filled."""
    cache = CudaCache(opt_config(64, 4, layers=1), 8 * num_beams, 900, device)
    cache.reset(torch.arange(20, 900, 110, device=device), num_beams)
    rows = torch.arange(8 * num_beams, device=device)
    for _ in range(3):
        cache.sources.copy_(torch.randint(0, 8 * num_beams, cache.sources.shape))
        beams = torch.randint(0, num_beams, rows.shape, device=device)
        source_rows = rows // num_beams * num_beams + beams
        filled = torch.arange(900, device=device) < cache.lengths[:, None]
        expected = torch.where(filled, cache.sources[source_rows], rows.int()[:, None])
        cache.reorder(source_rows)
        assert torch.equal(cache.sources, expected)


@pytest.mark.parametrize("head_size", [8, 80, 128])
def test_rows_are_moved_as_far_as_they_have_tokens(device, head_size):
    layers, rows, heads, max_len = 3, 40, 5, 96
    generator = torch.Generator(device).manual_seed(head_size)
    shape = (layers, rows, heads, max_len, head_size)
    keys, values = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.float16)
        for _ in range(2)
    )
    lengths = torch.randint(0, max_len + 1, (rows,), generator=generator, device=device)
    order = torch.randperm(rows, generator=generator, device=device)
    pairs = order[:26].view(2, 13).contiguous()
    lengths[pairs[0, :3]] = torch.tensor([0, 1, max_len], device=device)
    expected = []
    for cache in (keys, values):
        wanted = cache.clone()
        for source, target in pairs.T.tolist():
            length = int(lengths[source])
            wanted[:, target, :, :length] = cache[:, source, :, :length]
        expected.append(wanted)
    launch(
        kernels.move_rows_kernel,
        (heads, layers, pairs.shape[1]),
        keys,
        values,
        lengths,
        pairs,
        rows * heads * max_len * head_size,
        max_len * head_size,
        head_size,
        BLOCK=2048,
        device=device,
    )
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("vocab_size", [5, 8192, 50272, 50273])
def test_the_likeliest_tokens_and_whether_scores_are_finite(device, vocab_size):
    scores = torch.randn(9, vocab_size, device=device)
    scores[1, 3] = scores[1, 4] = 50  # of two the first
    for row, bad in ((2, math.nan), (3, math.inf), (4, -math.inf)):
        scores[row, vocab_size - 1] = bad
    tokens, finite = likeliest(scores)
    assert finite.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1]
    whole = finite.bool()
    assert torch.equal(scores.gather(1, tokens[:, None])[whole, 0], scores[whole].amax(1))
    assert tokens[1] == 3
    assert ((tokens >= 0) & (tokens < vocab_size)).all()

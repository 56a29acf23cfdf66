"""The native session against transformers' OPT: same ids, same scores, whatever the batch."""

import collections
import copy
import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import opt_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import cpu
from blip2.checkpoints import open_checkpoint
from blip2.engines import open_language_session
from blip2.errors import Blip2Error
from blip2.language import GenerationOptions, conversion
from blip2.language.native import checkpoint as reading
from blip2.language.native.linear import FloatLinear, dequantize, quantize

SHAPES = {
    "pre-LN": {},
    "post-LN, projected": opt_models.POST_LN,
    "one wide head": {"num_attention_heads": 1, "num_hidden_layers": 1},
    "small heads, narrow MLP, GELU": {
        "num_attention_heads": 16,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "activation_function": "gelu",
    },
}
NEW_TOKENS = 14
TABLE_ROWS = 3


def convert(model, directory, **options):
    """Convert a model in memory to a TensorRT-LLM checkpoint and open it."""
    model.save_pretrained(directory / "hf")
    checkpoint = open_checkpoint(directory / "hf")
    options = conversion.ConversionOptions(**{"dtype": "float32", **options})
    config = conversion.target_config(checkpoint, options)
    conversion.convert(checkpoint, config, directory / "opt")
    return open_language_session(directory / "opt")


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A transformers OPT and the native session on the same weights."""
    model = opt_models.opt(seed=len(request.param), **SHAPES[request.param])
    return model, convert(model, tmp_path_factory.mktemp("opt"))


def random_prompts(model, count, seed=0):
    """Prompts of different lengths with image rows, and what transformers calls them.

    Returns input_ids as sessions take them and the embeddings of the image rows, in the width
    that transformers' model takes.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size, width = model.config.vocab_size, model.config.word_embed_proj_dim
    rows = vocab_size + torch.arange(TABLE_ROWS)
    texts = [
        torch.randint(3, vocab_size, (1 + (5 * index) % 7,), generator=generator)
        for index in range(count)
    ]
    input_ids = [torch.cat((rows, torch.tensor([2]), text)) for text in texts]
    return input_ids, torch.randn(count, TABLE_ROWS, width, generator=generator)


def table_of(model, images):
    """The prompt table: what the first layer sees of the images."""
    project = model.model.decoder.project_in
    return images if project is None else project(images).detach()


def reference(model, input_ids, images, options):
    """transformers' answer to one request: (token ids before the end, score) of each beam."""
    # In the place of image rows transformers sees BOS ids, which the text has too: its repetition
    # penalty, which covers the prompt, is then not affected by them.
    ids = torch.where(input_ids < model.config.vocab_size, input_ids, 2)[None]
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[0, : len(images)] = images
    output = model.generate(
        input_ids=ids,
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=options.num_beams,
        num_return_sequences=options.num_beams,
        max_new_tokens=options.max_output_len,
        eos_token_id=options.end_id,
        pad_token_id=options.pad_id,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        repetition_penalty=options.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = [None] if options.num_beams == 1 else output.sequences_scores.tolist()
    beams = []
    for sequence, score in zip(output.sequences.tolist(), scores, strict=True):
        new = sequence[ids.shape[1] :]
        ended = options.end_id in new
        beams.append((new[: new.index(options.end_id)] if ended else new, score, ended))
    return beams


def assert_same(generation, expected):
    assert [beam.token_ids for beam in generation.beams] == [ids for ids, _, _ in expected]
    for beam, (_, score, ended) in zip(generation.beams, expected, strict=True):
        assert beam.finished == ended
        if score is None:
            assert beam.score is None
        else:
            assert beam.score == pytest.approx(score, rel=1e-5, abs=2e-5)


def frequent_token(model, prompts, images):
    """A token that answers contain often: as end token it ends many of them, at all steps."""
    options = GenerationOptions(end_id=-1, max_output_len=NEW_TOKENS, num_beams=4)
    counts = collections.Counter()
    for ids, rows in zip(prompts, images, strict=True):
        for beam, _, _ in reference(model, ids, rows, options):
            counts.update(set(beam[2:]) - set(beam[:2]))
    return counts.most_common(1)[0][0]


def every_option(end_id):
    base = {"end_id": end_id, "max_output_len": NEW_TOKENS}
    yield GenerationOptions(**base)
    yield GenerationOptions(**base, repetition_penalty=1.6)
    yield GenerationOptions(**base | {"max_output_len": 1})
    for num_beams, early_stopping in itertools.product((2, 3, 5), (False, True)):
        yield GenerationOptions(**base, num_beams=num_beams, early_stopping=early_stopping)
    yield GenerationOptions(**base | {"max_output_len": 1}, num_beams=3)
    for length_penalty, early_stopping in ((-1.0, False), (0.0, True), (0.5, True), (3.0, False)):
        yield GenerationOptions(
            **base, num_beams=4, length_penalty=length_penalty, early_stopping=early_stopping
        )
    yield GenerationOptions(**base, num_beams=3, repetition_penalty=1.4)
    yield GenerationOptions(**base, num_beams=2, repetition_penalty=0.8, length_penalty=2.0)


def test_ids_and_scores_are_those_of_transformers(pair):
    model, session = pair
    prompts, images = random_prompts(model, 3)
    table, end_id = table_of(model, images), frequent_token(model, prompts, images)
    lengths = []
    for options in every_option(end_id):
        answers = session.generate(prompts, table, options)
        for ids, rows, answer in zip(prompts, images, answers, strict=True):
            assert_same(answer, reference(model, ids, rows, options))
            if options.max_output_len > 1:
                lengths += [len(beam.token_ids) for beam in answer.beams]
    # Otherwise this would not have tested how searches end, or how they go on.
    assert len(set(lengths)) > 4
    assert NEW_TOKENS in lengths
    assert sum(length < NEW_TOKENS for length in lengths) > 10


def test_no_step_is_taken_once_all_have_ended_but_those_queued_ahead(pair, monkeypatch):
    """As a GPU's session does it: the end is read some steps late, and nothing else changes."""
    model, session = pair
    prompts, images = random_prompts(model, 1)
    table = table_of(model, images)
    [endless] = session.generate(prompts, table, GenerationOptions(-1, max_output_len=NEW_TOKENS))
    options = GenerationOptions(endless.beams[0].token_ids[3], max_output_len=NEW_TOKENS)
    answers, steps = [], []
    step = type(session._model).step
    monkeypatch.setattr(
        session._model, "step", lambda *a: steps.append(1) or step(session._model, *a)
    )
    taken = []
    for ahead in (0, 1, 2, NEW_TOKENS):
        monkeypatch.setattr(session._model, "steps_ahead", ahead)
        answers.append(session.generate(prompts, table, options))
        taken.append(len(steps))
        steps.clear()
    assert all(answer == answers[0] for answer in answers)
    assert taken[0] <= 3
    assert taken[1:] == [taken[0] + 1, taken[0] + 2, NEW_TOKENS - 1]


def logits_of_both(model, session):
    """After four prompts and after two further tokens each: (ours, transformers'), B x 3 x V."""
    prompts, images = random_prompts(model, 4)
    session.load()
    native = session._model
    lengths = torch.tensor([len(ids) for ids in prompts])
    cache = native.new_cache(lengths, num_beams=1, max_new_tokens=3)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    images = images.to(model.dtype)
    ours = [native.prefill(padded, lengths, table_of(model, images), cache)]
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    ours += [native.step(row, cache) for row in tokens]
    expected = []
    for request, (ids, rows) in enumerate(zip(prompts, images, strict=True)):
        text = torch.cat((ids[TABLE_ROWS:], tokens[:, request]))
        embeds = torch.cat((rows, model.get_input_embeddings()(text)))[None]
        expected.append(model(inputs_embeds=embeds).logits[0, -3:].detach())
    return torch.stack(ours, dim=1), torch.stack(expected)


def test_logits_are_those_of_transformers(pair):
    actual, expected = logits_of_both(*pair)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_is_held_once(tied, tmp_path):
    """The format stores it twice."""
    model = opt_models.opt(tie_word_embeddings=tied)
    if not tied:  # by a single digit
        model.lm_head.weight = torch.nn.Parameter(model.model.decoder.embed_tokens.weight.clone())
        model.lm_head.weight.data[3, 5] *= 1 + 2**-20
    session = convert(model, tmp_path)
    session.load()
    weights = session._model.weights
    assert (weights.head.weight.data_ptr() == weights.embedding.data_ptr()) == tied


@pytest.fixture
def pretend_threads(monkeypatch):
    """A function that lets PyTorch say that it computes on so many threads; it goes on as it did."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)

    return pretend


def test_layers_are_packed_side_by_side_and_stay_in_order(tmp_path, monkeypatch, pretend_threads):
    """Each of the four waits for the other three to be read, the first longest."""
    read, others = reading.TRTLLMTensors.read, threading.Barrier(4)

    def read_with_others(tensors, name, load):
        if name.endswith("input_layernorm.weight"):
            others.wait(timeout=60)
            time.sleep(0.2 if "layers.0." in name else 0)
        return read(tensors, name, load)

    monkeypatch.setattr(reading.TRTLLMTensors, "read", read_with_others)
    pretend_threads(4)
    model = opt_models.opt(num_hidden_layers=4)
    actual, expected = logits_of_both(model, convert(model, tmp_path))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_runs_as_its_conversion_does(shape, tmp_path):
    """In float16, with the ids that transformers gives for weights rounded to it."""
    model = opt_models.opt(seed=len(shape), **SHAPES[shape])
    converted = convert(model, tmp_path, dtype="float16")
    direct = open_language_session(tmp_path / "hf")
    prompts, images = random_prompts(model, 3)
    model = model.half().float()
    table = table_of(model, images)
    options = GenerationOptions(end_id=17, max_output_len=NEW_TOKENS)
    answers = direct.generate(prompts, table, options)
    assert answers == converted.generate(prompts, table, options)
    for answer, ids, rows in zip(answers, prompts, images, strict=True):
        assert answer.beams[0].token_ids == reference(model, ids, rows, options)[0][0]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.3},
        {"top_k": 0, "temperature": 1.5, "seed": 7},
        {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_batched_answers_equal_single_ones(pair, how):
    model, session = pair
    prompts, images = random_prompts(model, 6, seed=1)
    table = table_of(model, images)
    options = GenerationOptions(end_id=17, max_output_len=NEW_TOKENS, **how)
    together = session.generate(prompts, table, options)
    for index, answer in enumerate(together):
        one = slice(index, index + 1)
        [alone] = session._generate(prompts[one], table[one], options, index)
        assert [b.token_ids for b in alone.beams] == [b.token_ids for b in answer.beams]
    assert len({str(answer.beams[0].token_ids) for answer in together}) > 2


def test_every_request_sees_its_own_image(pair):
    model, session = pair
    prompts, images = random_prompts(model, 4, seed=2)
    table = table_of(model, images)
    options = GenerationOptions(end_id=-1, max_output_len=NEW_TOKENS)
    same_text = [prompts[1]] * 4
    answers = session.generate(same_text, table, options)
    swapped = session.generate(same_text, table.flip(0), options)
    assert answers == swapped[::-1]
    assert len({str(answer.beams[0].token_ids) for answer in answers}) > 1


def test_text_alone_needs_no_table(pair):
    model, session = pair
    ids = torch.tensor([2, 40, 41, 42])
    options = GenerationOptions(end_id=-1, max_output_len=NEW_TOKENS)
    [answer] = session.generate([ids], torch.zeros(1, 0, 64), options)
    images = torch.zeros(0, model.config.word_embed_proj_dim)
    assert_same(answer, reference(model, ids, images, options))


def test_ids_of_several_types_and_results_of_many_requests(pair):
    _, session = pair
    options = GenerationOptions(end_id=-1, max_output_len=2)
    ids = torch.tensor([2, 40], dtype=torch.int32)
    answers = session.generate([ids] * 9, torch.zeros(9, 1, 64, dtype=torch.float16), options)
    assert len(answers) == 9
    assert session.generate([], torch.zeros(0, 1, 64), options) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_checkpoints_give_the_answers_of_their_rounded_weights(tmp_path, dtype):
    model = opt_models.opt(seed=5)
    session = convert(model, tmp_path, dtype=dtype)
    rounded = model.to(getattr(torch, dtype)).float()
    prompts, images = random_prompts(model, 2)
    options = GenerationOptions(end_id=17, max_output_len=NEW_TOKENS, num_beams=3)
    for ids, rows, answer in zip(
        prompts, images, session.generate(prompts, images, options), strict=True
    ):
        assert_same(answer, reference(rounded, ids, rows, options))


def numpy_quantised(weight: torch.Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """TensorRT-LLM's arithmetic written out in float64."""
    weight = weight.double().numpy()
    limit = 2 ** (bits - 1)
    scale = np.abs(weight).max(axis=1, keepdims=True) / limit
    scaled = weight / scale
    rounded = np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)
    return np.clip(rounded, -limit, limit - 1), scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantisation_is_that_of_float64(bits, dtype):
    weight = (torch.randn(200, 256, generator=torch.Generator().manual_seed(bits))).to(dtype)
    values, scales = quantize(weight, bits)
    expected, expected_scales = numpy_quantised(weight, bits)
    assert values.dtype == torch.int8
    assert np.array_equal(values.numpy(), expected)
    np.testing.assert_allclose(scales.numpy(), expected_scales[:, 0], rtol=1e-7)
    limit = 2 ** (bits - 1)
    # Every row's largest weight becomes +limit, which does not exist, or -limit, which does.
    assert values.min() == -limit
    assert values.max() == limit - 1
    error = (dequantize(values, scales) - weight.float()).abs().amax(1) / scales
    assert error.max() <= 1 + 1e-3
    assert error.median() <= 1 + 1e-3


def test_quantisation_rounds_halves_away_from_zero_and_clips():
    just_below_half = float(np.nextafter(np.float32(0.5), np.float32(0)))
    row = [-128.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 127.5, just_below_half, -1.25]
    values, scales = quantize(torch.tensor([row, [0.0] * 10]), 8)
    assert values[0].tolist() == [-128, 1, -1, 2, 3, -3, 127, 127, 0, -1]
    assert values[1].tolist() == [0] * 10
    assert scales.tolist() == [1.0, 0.0]
    values, _ = quantize(torch.tensor([[8.0, -8.0, 7.4, 6.5, -7.5]]), 4)
    assert values.tolist() == [[7, -8, 7, 7, -8]]


def test_quantisation_rounds_what_is_next_to_halves():
    halves = np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)
    beside = [np.nextafter(halves, np.float32(to)) for to in (-200, 200)]
    row = np.concatenate([[np.float32(-128)], *beside])
    values, _ = quantize(torch.from_numpy(row)[None], 8)
    exact = row.astype(np.float64)
    rounded = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
    assert values[0].tolist() == np.clip(rounded, -128, 127).tolist()


@pytest.mark.parametrize("bits, limit", [(8, 128), (4, 8)])
def test_scales_have_the_checkpoints_type(bits, limit):
    # Of a weight as small as this, float16 keeps a scale with few digits.
    weight = torch.tensor([[limit * 3.89e-5, limit * -2e-5]]).half()
    scale = (weight.float().abs().max() / limit).half()
    assert scale.double() != weight.double().abs().max() / limit
    values, _ = numpy_quantised(weight, bits)
    packed = FloatLinear.pack(weight, None, bits)
    assert torch.equal(packed.weight, torch.from_numpy(values).float() * scale.float())


def quantised(model, bits: int):
    """A float64 copy with weights rounded as TensorRT-LLM does, the head's to 8 bits."""
    model = copy.deepcopy(model).half().double()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data)  # no longer the embedding
    for linear in linears(model):
        values, scales = numpy_quantised(linear.weight.data, 8 if linear is model.lm_head else bits)
        rounded = torch.from_numpy(values * scales.astype(np.float16).astype(float))
        linear.weight = torch.nn.Parameter(rounded)
    return model


def linears(model) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def round_inputs(linear: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """To 8 bits, as many as share a scale in MatMulNBits (a hook for transformers' linears)."""
    block = next(size for size in (128, 64, 32) if linear.in_features % size == 0)
    blocks = inputs[0].unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / scale.where(scale > 0, 1.0)).round().mul(scale).flatten(-2)


@pytest.mark.parametrize("quant_algo, bits", [("W8A16", 8), ("W4A16", 4)])
def test_weight_only_logits_are_those_of_rounded_weights_and_inputs(tmp_path, quant_algo, bits):
    model = opt_models.opt(seed=6)
    session = convert(model, tmp_path, dtype="float16", quant_algo=quant_algo)
    reference_model = quantised(model, bits)
    actual, expected = logits_of_both(reference_model, session)
    assert (actual - expected).norm() <= 0.03 * expected.norm()
    for linear in linears(reference_model):
        linear.register_forward_pre_hook(round_inputs)
    actual, expected = logits_of_both(reference_model, session)
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    # An input within float32's error of a half goes to either side, and takes others with it.
    assert errors.median() <= 1e-5
    assert errors.max() <= 0.02


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
@pytest.mark.parametrize("quant_algo", ["W8A16", "W4A16"])
def test_threads_do_not_grow_with_the_layers(tmp_path, pretend_threads, quant_algo):
    """As on 16 cores, where 15 threads for each of its 49 linears would be 735."""
    model = opt_models.opt(num_hidden_layers=12)
    session = convert(model, tmp_path, dtype="float16", quant_algo=quant_algo)
    pretend_threads(16)
    before = len(list(Path("/proc/self/task").iterdir()))
    session.load()
    started = len(list(Path("/proc/self/task").iterdir())) - before
    assert 15 <= started <= 8 * 15


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A converted checkpoint."""
    directory = tmp_path_factory.mktemp("good")
    convert(opt_models.opt(num_hidden_layers=1), directory, dtype="float16")
    return directory / "opt"


@pytest.fixture
def bad(good, tmp_path):
    """One to damage, without the description that would notice first."""
    for name in ("config.json", "rank0.safetensors"):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


class TestBadCheckpoints:
    def test_it_opens_without_a_description(self, bad):
        assert open_language_session(bad).hidden_size == 64

    @pytest.mark.parametrize(
        "edit, message",
        [
            (lambda t: t.pop("lm_head.weight"), "nothing as lm_head.weight"),
            (lambda t: t.update(extra=torch.ones(2)), "no such tensor"),
            (
                lambda t: t.update({"transformer.ln_f.bias": torch.zeros(63)}),
                r"shape \[63\] as transformer.ln_f.bias",
            ),
            (
                lambda t: t["transformer.layers.0.mlp.fc.weight"][3, 4].fill_(torch.nan),
                "NaN or Inf in transformer.layers.0.mlp.fc.weight",
            ),
            (
                lambda t: t["lm_head.weight"][3, 4].fill_(-torch.inf),
                "NaN or Inf in lm_head.weight",
            ),
        ],
    )
    @pytest.mark.parametrize("in_bfloat16", [False, True])
    def test_wrong_tensors(self, bad, monkeypatch, in_bfloat16, edit, message):
        monkeypatch.setattr(cpu, "is_fast_in_bfloat16", lambda: in_bfloat16)
        tensors = load_file(bad / "rank0.safetensors")
        edit(tensors)
        save_file(tensors, bad / "rank0.safetensors")
        with pytest.raises(Blip2Error, match=message):
            open_language_session(bad).load()

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}, "split over 2 GPUs"),
            ({"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}}, "mapping is"),
            ({"architecture": "LlamaForCausalLM"}, "architecture is 'LlamaForCausalLM'"),
            ({"quantization": {"quant_algo": "FP8"}}, "quantization is"),
            ({"dtype": "int8"}, "dtype is 'int8'"),
            ({"hidden_size": "64"}, "hidden_size is '64'"),
            ({"vocab_size": None}, "vocab_size is None"),
            ({"num_attention_heads": 5}, "no multiple"),
            ({"num_hidden_layers": 2}, "nothing as transformer.layers.1"),
            ({"hidden_act": "swish"}, "activation swish"),
        ],
    )
    def test_wrong_config(self, bad, changes, message):
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(Blip2Error, match=message) as error:
            open_language_session(bad)
        assert "\n" not in str(error.value)

    def test_missing_config_field(self, bad):
        config = json.loads((bad / "config.json").read_text())
        del config["vocab_size"]
        (bad / "config.json").write_text(json.dumps(config))
        with pytest.raises(Blip2Error, match="vocab_size"):
            open_language_session(bad)

    def test_truncated(self, good, bad):
        weights = bad / "rank0.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(Blip2Error, match=r"cannot read .*rank0"):
            open_language_session(bad)
        (bad / "rank0.json").write_bytes((good / "rank0.json").read_bytes())
        with pytest.raises(Blip2Error, match="truncated or was replaced"):
            open_language_session(bad)

    def test_missing_artifacts(self, tmp_path):
        with pytest.raises(Blip2Error, match=r"absent does not exist .*convert_checkpoint"):
            open_language_session(tmp_path / "absent")
        with pytest.raises(Blip2Error, match=r"holds no OPT .*convert_checkpoint"):
            open_language_session(tmp_path)

    def test_requests_beyond_the_limits(self, good):
        session = open_language_session(good)
        ids, table = torch.tensor([2, 5]), torch.zeros(1, 1, 64)
        with pytest.raises(Blip2Error, match="at most 64"):
            session.generate([ids], table, GenerationOptions(end_id=9, max_output_len=63))
        longest = GenerationOptions(end_id=-1, max_output_len=62)
        [answer] = session.generate([ids], table, longest)
        assert len(answer.beams[0].token_ids) == 62
        with pytest.raises(Blip2Error, match="OPT yields NaN or Inf"):
            session.generate(
                [torch.tensor([96, 2])],
                torch.full((1, 1, 64), torch.nan),
                GenerationOptions(end_id=9),
            )

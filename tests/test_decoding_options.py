"""min_output_len, stop, num_return_sequences and log_prob, against transformers' `generate`.

On a session of a CPU and on one of a GPU over doubles of its kernels, whole batches at a time.
"""

from __future__ import annotations

import itertools
import random

import opt_models
import pytest
import tokenizers
import torch
import transformers
from test_native_opt import TABLE_ROWS, convert, random_prompts, table_of

from blip2.errors import Blip2Error
from blip2.language import Beam, GenerationOptions
from blip2.language.stopping import StopTexts

NEW_TOKENS = 20
WORDS = list(
    itertools.islice(
        ("".join(w) for n in range(1, 5) for w in itertools.product("abc", repeat=n)), 92
    )
)
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]  # as many as the models have
TEXTS = ("bcca", "caac", "bb" * 4)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def stop() -> StopTexts:
    return StopTexts(TEXTS, [token.encode() for token in TOKENS])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model = opt_models.opt(seed=4)
    assert model.config.vocab_size == len(TOKENS)
    return model, convert(model, tmp_path_factory.mktemp("opt"))


@torch.inference_mode()
def reference(model, tokenizer, prompt, images, options: GenerationOptions) -> list[Beam]:
    """What transformers generates behind one prompt, and of it the transition scores."""
    ids = torch.where(prompt < model.config.vocab_size, prompt, 2)[None]
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[0, :TABLE_ROWS] = images
    # It looks for stop texts in the prompt too, if it is told the ids; a penalty has to be.
    known = {"input_ids": ids} if options.repetition_penalty != 1 else {}
    output = model.generate(
        **known,
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
        do_sample=False,
        num_beams=options.num_beams,
        num_return_sequences=options.sequences,
        max_new_tokens=options.max_output_len,
        min_new_tokens=options.min_output_len or None,
        stop_strings=list(options.stop.texts) if options.stop else None,
        tokenizer=tokenizer,
        eos_token_id=options.end_id,
        pad_token_id=options.pad_id,
        repetition_penalty=options.repetition_penalty,
        length_penalty=options.length_penalty,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    skipped = ids.shape[1] if known else 0
    if options.num_beams > 1:
        indices = output.beam_indices
        log_probs = model.compute_transition_scores(output.sequences, output.scores, indices)
        lengths = (indices >= 0).sum(1).tolist()
        scores = output.sequences_scores.tolist()
    else:
        log_probs = model.compute_transition_scores(
            output.sequences, output.logits, normalize_logits=True
        )
        lengths, scores = [log_probs.shape[1]], [None]
    beams = []
    for ids, length, each, score in zip(
        output.sequences[:, skipped:].tolist(), lengths, log_probs, scores, strict=True
    ):
        ids, ended = ids[:length], ids[length - 1] == options.end_id
        finished = ended or length < options.max_output_len
        mean = float(each[:length].mean())
        beams.append(Beam(ids[: length - ended], score, finished, mean))
    return beams


SEARCHES = [
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.3},
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    {"num_beams": 5, "num_return_sequences": 1},
    {"num_beams": 3, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("least", [0, 1, 12, NEW_TOKENS])
@pytest.mark.parametrize("stops", [False, True])
def test_answers_and_their_scores_are_those_of_transformers(
    pair, tokenizer, stop, search, least, stops
):
    if stops and search.get("repetition_penalty"):
        pytest.skip("transformers would look for stop texts in the prompt")
    model, session = pair
    prompts, images = random_prompts(model, 6, seed=2)
    options = GenerationOptions(
        end_id=5,
        max_output_len=NEW_TOKENS,
        min_output_len=least,
        stop=stop if stops else None,
        **search,
    )
    found = session.generate(prompts, table_of(model, images), options)
    for generation, prompt, rows in zip(found, prompts, images, strict=True):
        expected = reference(model, tokenizer, prompt, rows, options)
        assert [b.token_ids for b in generation.beams] == [b.token_ids for b in expected]
        for beam, truth in zip(generation.beams, expected, strict=True):
            assert beam.log_prob == pytest.approx(truth.log_prob, abs=2e-5)
            assert beam.score == (truth.score and pytest.approx(truth.score, abs=2e-5))
            if len(beam.token_ids) < NEW_TOKENS:
                assert beam.finished == truth.finished
            assert len(beam.token_ids) >= (0 if stops else least)


def test_what_is_compared_is_worth_comparing(pair, stop):
    """Each option changes some answer; texts end some, the end token others, and some go on."""
    model, session = pair
    prompts, images = random_prompts(model, 6, seed=2)
    base = {"end_id": 5, "max_output_len": NEW_TOKENS}
    table = table_of(model, images)
    for search in ({}, {"num_beams": 4}):
        ways = [search, {**search, "min_output_len": 12}, {**search, "stop": stop}]
        plain, held, stopped = (
            [g.beams[0] for g in session.generate(prompts, table, GenerationOptions(**base, **way))]
            for way in ways
        )
        assert min(len(beam.token_ids) for beam in plain) < 12
        assert [beam.token_ids for beam in held] != [beam.token_ids for beam in plain]
        ended = [stop.length(beam.token_ids) for beam in stopped]
        assert any(ended)
        assert not all(ended)
        assert all(beam.finished for beam, length in zip(stopped, ended, strict=True) if length)


def draws(session, prompts, table, **how) -> list[list[Beam]]:
    base = {"end_id": 5, "top_k": 0, "temperature": 1.5, "max_output_len": NEW_TOKENS, "seed": 3}
    options = GenerationOptions(**base | how)
    return [list(g.beams) for g in session.generate(prompts, table, options)]


def test_several_draws_of_a_request_are_its_own(pair):
    """The first is that of a request with one; none depends on what else is in the batch."""
    model, session = pair
    prompts, images = random_prompts(model, 5, seed=1)
    table = table_of(model, images)
    several = draws(session, prompts, table, num_return_sequences=4)
    assert [len(beams) for beams in several] == [4] * 5
    assert all(len({tuple(b.token_ids) for b in beams}) == 4 for beams in several)
    one = draws(session, prompts, table)
    assert [[b.token_ids for b in beams[:1]] for beams in several] == [
        [b.token_ids for b in beams] for beams in one
    ]
    [alone] = draws(session, prompts[:1], table[:1], num_return_sequences=4)
    assert [b.token_ids for b in alone] == [b.token_ids for b in several[0]]


@torch.inference_mode()
def test_a_draws_score_is_what_the_model_makes_of_its_tokens(pair, stop):
    """Neither the temperature nor a penalty has changed it."""
    model, session = pair
    prompts, images = random_prompts(model, 5, seed=1)
    how = {"num_return_sequences": 3, "repetition_penalty": 1.2, "stop": stop, "top_p": 0.95}
    checked = 0
    for beams, prompt, rows in zip(
        draws(session, prompts, table_of(model, images), **how), prompts, images, strict=True
    ):
        for beam in beams:
            is_ended = beam.finished and stop.length(beam.token_ids) is None
            new = torch.tensor([*beam.token_ids, *[5] * is_ended])
            ids = torch.cat((torch.where(prompt < len(TOKENS), prompt, 2), new))[None]
            embeds = model.get_input_embeddings()(ids)
            embeds[0, :TABLE_ROWS] = rows
            log_probs = model(inputs_embeds=embeds).logits[0].log_softmax(-1)
            of_new = log_probs[len(prompt) - 1 : -1].gather(1, new[:, None])
            assert beam.log_prob == pytest.approx(float(of_new.mean()), abs=2e-5)
            checked += is_ended
    assert 0 < checked < 15


@pytest.mark.parametrize("seed", range(20))
def test_texts_are_found_as_a_search_finds_them(seed):
    """Random texts and tokens of two letters and a letter of two bytes, some without any text."""
    chance = random.Random(seed)

    def text(shortest: int, longest: int) -> str:
        return "".join(chance.choices("abé", k=chance.randint(shortest, longest)))

    texts = [text(1, 5) for _ in range(chance.randint(1, 4))]
    tokens = [text(0, 4).encode() for _ in range(30)] + [b"\xc3", b"\xa9"]
    stop = StopTexts(texts, tokens)
    for _ in range(50):
        ids = chance.choices(range(len(tokens)), k=30)
        said, expected = b"", None
        for number, token in enumerate(ids, 1):
            said += tokens[token]
            if any(text.encode() in said for text in texts):
                expected = number
                break
        assert stop.length(ids) == expected
    assert stop == StopTexts(texts, tokens)
    assert stop != StopTexts([*texts, "x"], tokens)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"min_output_len": 31}, "`min_output_len` is 31"),
        ({"min_output_len": -1}, "`min_output_len` is -1"),
        ({"num_return_sequences": 0}, "`num_return_sequences` is 0"),
        ({"num_return_sequences": 2}, "`num_return_sequences` is 2, and `num_beams` 1"),
        ({"num_return_sequences": 4, "num_beams": 3}, "is 4, and `num_beams` 3"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(Blip2Error, match=message):
        GenerationOptions(end_id=5, **wrong)


def test_an_empty_stop_text_is_refused():
    with pytest.raises(Blip2Error, match="`stop` has an empty text"):
        StopTexts([".", ""], [b"a"])

"""OPT's session on a GPU, from a checkpoint to tokens, against transformers' OPT in float64."""

from __future__ import annotations

import opt_models
import pytest
import torch
from exact import fill_free_memory_with_nan
from torch.nn.utils.rnn import pad_sequence

from blip2.checkpoints import open_checkpoint
from blip2.language import GenerationOptions, conversion
from blip2.language.native.cuda import CudaModel
from blip2.language.native.session import NativeSession

VOCAB, WIDTH, TABLE_ROWS, NEW_TOKENS = 960, 512, 8, 10
END_ID = 7
# What float16 may make of a logit, or of the sum of an answer's log probabilities: two that are
# nearer to one another than that are both right.
TIE = 3e-3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model in float64 and the session, of a checkpoint in float16."""
    directory = tmp_path_factory.mktemp("opt")
    shape = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 4 * WIDTH}
    model = opt_models.opt(
        spread=0.06, vocab_size=VOCAB, num_attention_heads=8, max_position_embeddings=200, **shape
    ).half()
    model.save_pretrained(directory / "hf")
    checkpoint = open_checkpoint(directory / "hf")
    config = conversion.target_config(checkpoint, conversion.ConversionOptions(dtype="float16"))
    conversion.convert(checkpoint, config, directory / "opt")
    session = NativeSession(directory / "opt")
    session.load()
    assert isinstance(session._model, CudaModel)
    return model.double(), session


class Requests:
    """Texts of several lengths behind image features."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        rows = VOCAB + torch.arange(TABLE_ROWS)
        lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
        texts = [torch.randint(8, VOCAB, (length,), generator=generator) for length in lengths]
        self.ids = [torch.cat((rows, text)) for text in texts]
        self.table = torch.randn(count, TABLE_ROWS, WIDTH, generator=generator).half()

    def log_probs(self, model, answers: list[list[int]]) -> list[torch.Tensor]:
        """Of every token at each place of one answer to each request, and behind it: n + 1 x VOCAB."""
        texts = [
            torch.cat((ids[TABLE_ROWS:], torch.tensor(answer, dtype=torch.int64)))
            for ids, answer in zip(self.ids, answers, strict=True)
        ]
        words = model.get_input_embeddings()(pad_sequence(texts, batch_first=True))
        embeds = torch.cat((self.table.double(), words), 1)  # what is padded stands behind
        with torch.inference_mode():
            logits = model(inputs_embeds=embeds).logits.log_softmax(-1)
        ends = [TABLE_ROWS + len(text) for text in texts]
        return [
            row[end - len(answer) - 1 : end]
            for row, end, answer in zip(logits, ends, answers, strict=True)
        ]


@pytest.mark.parametrize("count", [1, 3, 40, 64])
def test_greedy_answers_are_the_likeliest(pair, device, count):
    model, session = pair
    requests = Requests(count)
    options = GenerationOptions(end_id=END_ID, max_output_len=NEW_TOKENS)
    fill_free_memory_with_nan(device)
    generations = session.generate(requests.ids, requests.table, options)
    answers = [generation.beams[0].token_ids for generation in generations]
    for answer, log_probs in zip(answers, requests.log_probs(model, answers), strict=True):
        ended = len(answer) < NEW_TOKENS
        chosen = torch.tensor([*answer, END_ID] if ended else answer)
        likelihoods = log_probs[: len(chosen)]
        behind = likelihoods.max(1).values - likelihoods.gather(1, chosen[:, None])[:, 0]
        assert behind.max() < TIE
    assert generations == session.generate(requests.ids, requests.table, options)


@pytest.mark.parametrize("count, num_beams", [(8, 5), (12, 3)])
def test_beams_are_those_of_transformers(pair, device, count, num_beams):
    """The scores are those of the answers; and where no tie was decided otherwise on the way, both
    are what transformers finds in float64."""
    model, session = pair
    requests = Requests(count)
    options = GenerationOptions(end_id=END_ID, max_output_len=NEW_TOKENS, num_beams=num_beams)
    fill_free_memory_with_nan(device)
    generations = session.generate(requests.ids, requests.table, options)
    same = 0
    for beam in range(num_beams):
        answers = [generation.beams[beam].token_ids for generation in generations]
        log_probs = requests.log_probs(model, answers)
        for generation, answer, each in zip(generations, answers, log_probs, strict=True):
            ended = len(answer) < NEW_TOKENS
            chosen = torch.tensor([*answer, END_ID] if ended else answer)
            score = each[: len(chosen)].gather(1, chosen[:, None]).mean()
            assert generation.beams[beam].score == pytest.approx(float(score), abs=TIE)
    for index, generation in enumerate(generations):
        ids = requests.ids[index].where(requests.ids[index] < VOCAB, 8)[None]
        embeds = model.get_input_embeddings()(ids).detach()
        embeds[0, :TABLE_ROWS] = requests.table[index].double()
        output = model.generate(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=END_ID,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_scores=True,
        )
        wanted = output.sequences[0, ids.shape[1] :].tolist()
        wanted = wanted[: wanted.index(END_ID)] if END_ID in wanted else wanted
        if generation.beams[0].token_ids == wanted:
            same += 1
            [score] = output.sequences_scores.tolist()
            assert generation.beams[0].score == pytest.approx(score, abs=TIE)
        assert len({tuple(beam.token_ids) for beam in generation.beams}) == num_beams
    assert same > count / 2

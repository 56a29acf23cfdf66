"""Tokenizers of both layouts, the order of ids, and texts that try to be more than text."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
import transformers
from models import tiny_tokenizer

from blip2 import prompts
from blip2.checkpoints import TokenIds
from blip2.errors import Blip2Error


@pytest.fixture
def directory(tmp_path):
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_picture_then_bos_then_text():
    ids = prompts.build_input_ids([2, 50, 51], num_query_tokens=4, vocab_size=320)
    assert ids.tolist() == [320, 321, 322, 323, 2, 50, 51]
    assert ids.dtype == torch.int64


@pytest.mark.parametrize(
    "text",
    ["Question: what? Answer:", "", "  ", "naïve 猫 🐈", "nul\0 byte", "</s><image>", "a\nb"],
)
def test_texts_encode_byte_for_byte(directory, text):
    """Every text is its bytes; a special token written out is no special token."""
    tokenizer = prompts.load_tokenizer(directory)
    ids = tokenizer.encode(text)
    assert ids[0] == 2
    assert len(ids) == 1 + len(text.encode())
    assert not set(ids[1:]) & {0, 1, 2, 3}
    assert tokenizer.decode(ids[1:]) == text.strip()


def test_end_is_the_newline_and_padding_opts(directory):
    tokenizer = prompts.load_tokenizer(directory)
    assert tokenizer.encode("\n")[1:] == [tokenizer.end_id]
    assert (tokenizer.bos_id, tokenizer.pad_id) == (2, 1)
    assert tokenizer.decode([2, *tokenizer.encode("red")[1:], 1]) == "red"


def test_vocabulary_of_older_checkpoints(directory, tmp_path):
    """facebook/opt-2.7b has vocab.json and merges.txt, and no tokenizer.json."""
    vocabulary = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(vocabulary))
    (old / "merges.txt").write_text("#version: 0.2\n")
    new, old = prompts.load_tokenizer(directory), prompts.load_tokenizer(old)
    for text in ("Question: what? Answer:", "</s>", "naïve 🐈"):
        assert old.encode(text) == new.encode(text)
    assert (old.end_id, old.pad_id, old.vocab_size) == (new.end_id, new.pad_id, new.vocab_size)


@pytest.mark.parametrize("error, says", [(OSError(), "OSError"), (OSError("no\nnet"), "no")])
def test_a_hub_that_fails_with_few_words_or_many_is_one_line(monkeypatch, error, says):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(Blip2Error, match=f"the hub says: {says}; make one with"):
        prompts.load_tokenizer("some/one")


def test_unusable_tokenizers_are_one_line(tmp_path):
    with pytest.raises(Blip2Error, match=r"holds no tokenizer\.json"):
        prompts.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Blip2Error, match="cannot read the tokenizer"):
        prompts.load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Blip2Error, match="has no </s> token"):
        prompts.load_tokenizer(tmp_path)


def checkpoint(directory, **text_config):
    """A BLIP-2's config.json beside the tokenizer, whose `.` is id 17 and newline 202."""
    config = {"model_type": "blip-2", "text_config": text_config}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "text_config, end_id",
    [({"eos_token_id": 202}, 202), ({"eos_token_id": [3]}, 3), ({}, 2)],
    ids=["the newline", "a list of one", "transformers' default"],
)
def test_answers_end_as_text_config_says(directory, tmp_path, text_config, end_id):
    checkpoint(directory, **text_config)
    tokenizer = prompts.load_tokenizer(directory)
    assert tokenizer.end_id == end_id
    tokenizer.save(tmp_path / "exported")
    again = prompts.load_tokenizer(tmp_path / "exported")
    assert (again.end_id, again.bos_id, again.pad_id) == (end_id, 2, 1)
    (tmp_path / "exported" / "generation_config.json").unlink()  # as exports before it were
    assert prompts.load_tokenizer(tmp_path / "exported").end_id == 202


def test_an_opt_alone_follows_lavis(directory):
    """Its own end is `</s>`, but its tokenizer is for a BLIP-2 that ends at the newline."""
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_text(json.dumps({"model_type": "opt", "eos_token_id": 2}))
    assert prompts.load_tokenizer(directory).end_id == 202


@pytest.mark.parametrize(
    "text_config, message",
    [
        ({"eos_token_id": [202, 2]}, r"ends answers by 2 tokens \(eos_token_id \[202, 2\]\)"),
        ({"eos_token_id": None}, "eos_token_id is None; set it to the id of one token"),
        ({"eos_token_id": -1}, "eos_token_id is -1; set it"),
        ({"eos_token_id": 17}, r"answers end by '\.' \(eos_token_id 17\), which is text"),
        ({"bos_token_id": "2"}, "bos_token_id is '2'; set it"),
    ],
)
def test_ends_that_cannot_be_kept_are_refused(directory, text_config, message):
    checkpoint(directory, **text_config)
    with pytest.raises(Blip2Error, match=message):
        prompts.load_tokenizer(directory)


def test_a_damaged_export_is_refused(directory):
    (directory / "generation_config.json").write_text('{"bos_token_id": 2}')
    with pytest.raises(Blip2Error, match="holds no bos_token_id and eos_token_id; make it again"):
        prompts.load_tokenizer(directory)


def test_what_is_not_read_is_said(directory, capsys):
    checkpoint(directory, eos_token_id=202, repetition_penalty=1.5)
    generation = {"eos_token_id": 202, "num_beams": 5, "do_sample": False, "temperature": 1.0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert prompts.load_tokenizer(directory).end_id == 202
    said = capsys.readouterr().err
    assert "asks for repetition_penalty 1.5, num_beams 5, which BLIP-2 in transformers does" in said
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    checkpoint(directory, eos_token_id=202)
    assert prompts.load_tokenizer(directory).end_id == 202
    assert "asks for eos_token_id 2, which" in capsys.readouterr().err
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [202]}))
    prompts.load_tokenizer(directory)
    assert capsys.readouterr().err == ""


def test_ids_beside_the_engines_count_for_any_tokenizer(directory):
    checkpoint(directory, eos_token_id=2)
    assert prompts.load_tokenizer(directory, TokenIds(2, 3)).end_id == 3
    assert prompts.load_tokenizer(directory, TokenIds()).end_id == 2


def test_words_that_a_checkpoint_added_are_read_as_tokens(directory, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["[VQA]", "<image>"])
    backend.add_tokens(["<color>"])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = prompts.load_tokenizer(directory)
    assert tokenizer.encode("[VQA]a<color>") == [2, 260, *tokenizer.encode("a")[1:], 262]
    assert len(tokenizer.encode("<image></s>")) == 1 + len("<image></s>")
    assert tokenizer.decode([260, 262]) == "<color>"
    tokenizer.save(tmp_path / "exported")
    again = prompts.load_tokenizer(tmp_path / "exported")
    assert again.encode("[VQA]a<color>") == tokenizer.encode("[VQA]a<color>")
    assert again.decode([260, 262]) == "<color>"


@pytest.mark.parametrize("described", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_tokens_added_beside_the_vocabulary(directory, described, whole):
    """As transformers wrote them for a fine-tune with new words."""
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    if not whole:
        backend.model.save(str(directory))  # vocab.json, merges.txt
        (directory / "tokenizer.json").unlink()
    words = [{"content": "<color>", "special": False}, {"content": "[VQA]", "special": True}]
    names = {"bos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "add_bos_token": True}
    if described == "tokenizer_config.json":
        names["added_tokens_decoder"] = {str(260 + i): word for i, word in enumerate(words)}
    else:
        content = {word["content"]: 260 + i for i, word in enumerate(words)}
        (directory / "added_tokens.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = prompts.load_tokenizer(directory)
    theirs = transformers.GPT2Tokenizer.from_pretrained(directory)
    for text in ("[VQA] a <color>b", "</s"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == [2, *ids]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()
    assert 260 in tokenizer.encode("<color>")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "is a T5Tokenizer, not the"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "sets split_special_tokens"),
        ("tokenizer_config.json", {"add_bos_token": False}, "puts nothing before a text"),
        ("tokenizer_config.json", {"additional_special_tokens": ["[VQA]"]}, "gives it no id"),
        ("added_tokens.json", {"<color>": 300}, "disagree on the id of '<color>': 260 and 300"),
    ],
)
def test_tokenizers_that_would_give_other_ids_are_refused(directory, name, content, message):
    (directory / name).write_text(json.dumps(content))
    with pytest.raises(Blip2Error, match=message) as error:
        prompts.load_tokenizer(directory)
    assert str(directory) in str(error.value)


def test_a_template_says_what_is_before_a_text(directory):
    template = tokenizers.processors.TemplateProcessing
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))

    def saved(single, *special):
        backend.post_processor = template(single=single, special_tokens=list(special))
        backend.save(str(directory / "tokenizer.json"))

    saved("<s> $A", ("<s>", 0))
    assert prompts.load_tokenizer(directory).encode("a")[0] == 0
    checkpoint(directory, bos_token_id=2)
    with pytest.raises(
        Blip2Error, match="puts token 0 before a text, the checkpoint's text_config"
    ):
        prompts.load_tokenizer(directory)
    for single, message in (
        ("$A", "puts nothing before a text, BLIP-2 wants a </s> there"),
        ("</s> $A </s>", "BLIP-2's puts one token before a text"),
    ):
        saved(single, ("</s>", 2))
        with pytest.raises(Blip2Error, match=message):
            prompts.load_tokenizer(directory)

"""Tokenizers of both layouts, the order of ids, and texts that try to be more than text."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
from models import tiny_tokenizer

from blip2 import prompts
from blip2.artifacts import UserError


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
    with pytest.raises(UserError, match=f"the hub says: {says}; make one with"):
        prompts.load_tokenizer("some/one")


def test_unusable_tokenizers_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        prompts.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        prompts.load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no </s> token"):
        prompts.load_tokenizer(tmp_path)

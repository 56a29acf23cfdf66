"""A checkpoint's tokenizer, with the ids that transformers gives for the same directory.

tokenizer.json is taken as it is where there is one, as transformers 5's TokenizersBackend does; older
OPT checkpoints have vocab.json and merges.txt. What transformers keeps beside them counts too:
added_tokens_decoder and the special tokens' names in tokenizer_config.json, or added_tokens.json and
special_tokens_map.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from blip2 import artifacts
from blip2.errors import Blip2Error

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
)
# Encoded as ordinary characters where a text holds them: no question can end the prompt or pose as
# a picture. Other special tokens are the checkpoint's own words, as `[VQA]` may be.
_OPT_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
CONTROL_TOKENS = (*_OPT_TOKENS, "<mask>", "<image>")
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# add_eos_token: transformers leaves it to tokenizer.json where there is one.
_UNKNOWN = (
    "add_eos_token",
    "split_special_tokens",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_SAVE_AGAIN = "load it with transformers 5 and save it again with save_pretrained()"


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a directory's files say.

    `bos` is the id that is put before a text, None where they say nothing of it. `prompt_tokens` are
    special tokens that a text may hold.
    """

    backend: tokenizers.Tokenizer
    bos: int | None
    prompt_tokens: tuple[str, ...]


def read_tokenizer(directory: Path) -> TokenizerFiles | None:
    """Read the tokenizer in a directory; None where there is none.

    Raises:
        Blip2Error: transformers would give other ids than this suite can.
        Exception: a file is damaged; the library that reads them raises nothing better.
    """
    config = _json(directory / "tokenizer_config.json")
    path = directory / "tokenizer.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        backend, fields = tokenizers.Tokenizer.from_str(text), json.loads(text)
        if fields["model"].get("dropout"):
            raise Blip2Error(
                f"{path} cuts texts at random (dropout)", "set its model's dropout to null"
            )
    elif (directory / "vocab.json").is_file():
        backend, fields = _from_vocabulary(directory, config), {}
    else:
        return None
    backend.no_truncation()
    backend.no_padding()
    tokenizer_class = config.get("tokenizer_class")
    if tokenizer_class not in (None, *_CLASSES) or config.get("auto_map"):
        raise Blip2Error(
            f"the tokenizer in {directory} is a {config.get('auto_map') or tokenizer_class}, not the"
            " byte-level one of OPT",
            "use the tokenizer of the BLIP-2 or OPT checkpoint",
        )
    for name in _UNKNOWN:
        if config.get(name):
            raise Blip2Error(
                f"{directory / 'tokenizer_config.json'} sets {name}, which this suite does not know",
                "remove it if the checkpoint was not trained with it",
            )
    special = _add_tokens(directory, backend, fields, config)
    bos = _bos(directory, backend, fields, config)
    control = {*CONTROL_TOKENS, None if bos is None else backend.id_to_token(bos)}
    return TokenizerFiles(backend, bos, tuple(t for t in special if t not in control))


def _from_vocabulary(directory: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    spaced = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _add_tokens(
    directory: Path,
    backend: tokenizers.Tokenizer,
    fields: Mapping[str, Any],
    config: Mapping[str, Any],
) -> list[str]:
    """Add to the backend what the files beside it name; return the special ones of all."""
    known = {token["content"]: token["special"] for token in fields.get("added_tokens") or ()}
    sources = [config]
    if "added_tokens_decoder" not in config:
        sources.append(_json(directory / "special_tokens_map.json"))
    names = {name: token for source in sources for name, token in source.items()}
    named = [
        _content(token)
        for name, token in names.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    ]
    if not fields and not named:
        named = list(_OPT_TOKENS)
    listed = [
        token for source in sources for name in _LISTED for token in _listed(source.get(name))
    ]

    if "added_tokens_decoder" in config:
        stated = {int(index): dict(t) for index, t in config["added_tokens_decoder"].items()}
    else:
        stated = {}
        for content, index in _json(directory / "added_tokens.json").items():
            special = content in {*named, *listed}
            stated[index] = {"content": content, "special": special, "normalized": not special}
    for index, token in sorted(stated.items()):
        content, special = token["content"], bool(token.get("special"))
        if content not in known:
            add = backend.add_special_tokens if special else backend.add_tokens
            add([_added(token)])
            known[content] = special
        if backend.token_to_id(content) != index:
            raise Blip2Error(
                f"the files in {directory} disagree on the id of {content!r}:"
                f" {backend.token_to_id(content)} and {index}",
                f"{_SAVE_AGAIN}",
            )
    for content in listed:
        if content not in known and content not in CONTROL_TOKENS:
            raise Blip2Error(
                f"the tokenizer in {directory} names {content!r} and gives it no id",
                f"{_SAVE_AGAIN}",
            )
    for content in named:
        if not known.get(content) and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, normalized=False)])
            known[content] = True
    return [content for content, special in known.items() if special]


def _added(token: Mapping[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(token["content"], **{name: token[name] for name in flags if name in token})


def _bos(
    directory: Path,
    backend: tokenizers.Tokenizer,
    fields: Mapping[str, Any],
    config: Mapping[str, Any],
) -> int | None:
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    if whole != bare:
        if whole[1:] == bare:
            return whole[0]
        raise Blip2Error(
            f"the tokenizer in {directory} makes {backend.encode('a').tokens} of 'a'",
            "BLIP-2's puts one token before a text: use the tokenizer of the BLIP-2 checkpoint",
        )
    says_none = (fields.get("post_processor") or {}).get("type") == "TemplateProcessing"
    adds = config.get("add_bos_token")
    if says_none or adds is False:
        raise Blip2Error(
            f"the tokenizer in {directory} puts nothing before a text, BLIP-2 wants a </s> there",
            "load it with add_bos_token=True and save it again with save_pretrained()",
        )
    if not adds or not config.get("bos_token"):
        return None
    return backend.token_to_id(_content(config["bos_token"]))


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _listed(tokens: Any) -> list[str]:
    return [_content(t) for t in (tokens.values() if isinstance(tokens, dict) else tokens or ())]


def _json(path: Path) -> dict[str, Any]:
    return artifacts.read_json(path, "downloading it again") if path.is_file() else {}

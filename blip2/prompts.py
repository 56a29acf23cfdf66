"""Text to input_ids and back, with BLIP-2's conventions.

A request to OPT is n ids that stand for the picture (vocab_size + 0 … n - 1: rows of the prompt
table), then BOS, then the text. By BLIP-2's custom BOS is `</s>`, and the answer ends at the newline;
a checkpoint may say otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch

from blip2.checkpoints import TokenIds
from blip2.checkpoints.tokenizer import FILES as TOKENIZER_FILES
from blip2.checkpoints.tokenizer import read_tokenizer
from blip2.errors import Blip2Error, first_line
from blip2.layout import EXPORT

BOS, PAD = "</s>", "<pad>"


class Tokenizer:
    """OPT's byte-level BPE behind the four calls that the pipeline needs.

    Special tokens written out in a text (`</s>`, `<image>`) are encoded as ordinary characters: a
    question cannot end the prompt or pose as a picture. Those that a checkpoint added for its
    prompts are read as tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        ids: TokenIds | None = None,
        prompt_tokens: Sequence[str] = (),
    ) -> None:
        """Take a backend, the checkpoint's ids, and the special tokens that a text may hold.

        Raises:
            Blip2Error: tokens are missing, or the end would be part of the answer.
        """
        backend.no_truncation()
        backend.no_padding()
        ids = ids or TokenIds()
        self._backend = backend
        self._encoder = _reading(backend, prompt_tokens) if prompt_tokens else backend
        self.bos_id = self._special(BOS) if ids.bos is None else ids.bos
        self.pad_id = self._special(PAD)
        self.end_id = self._newline() if ids.eos is None else ids.eos
        if text := self.decode([self.end_id]):
            raise Blip2Error(
                f"the checkpoint's answers end by {text!r} (eos_token_id {self.end_id}), which is"
                " text",
                "set text_config's eos_token_id to the newline's or that of a special token",
            )
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def _special(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise Blip2Error(
                f"the tokenizer has no {token} token",
                "use the tokenizer of the BLIP-2 or OPT checkpoint",
            )
        return token_id

    def _newline(self) -> int:
        newline = self._backend.encode("\n", add_special_tokens=False).ids
        if len(newline) != 1:
            raise Blip2Error(
                "the tokenizer has no single token for the newline, which ends BLIP-2's answers",
                "use the tokenizer of the BLIP-2 or OPT checkpoint",
            )
        return newline[0]

    def encode(self, text: str) -> list[int]:
        """BOS, then the ids of `text`; an empty text is BOS alone and asks for a caption.

        Raises:
            Blip2Error: the text holds what is no Unicode, as from an argument that is not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Blip2Error(
                f"the text {text!r} is not UTF-8", "write it in that encoding"
            ) from None
        # Not set before: tokenizers 0.13, which LAVIS needs, knows no such setting, but can save.
        self._encoder.encode_special_tokens = True
        return [self.bos_id, *self._encoder.encode(text, add_special_tokens=False).ids]

    def decode(self, token_ids: list[int]) -> str:
        """The text of generated ids, without special tokens and surrounding blanks."""
        return self._backend.decode(token_ids, skip_special_tokens=True).strip()

    def token_bytes(self, count: int) -> list[bytes]:
        """What each of `count` tokens adds to a text, in UTF-8; nothing, of special ones."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        tokens = [b""] * count
        for token, token_id in vocabulary.items():
            if token_id >= count:
                continue
            if token_id in added:
                tokens[token_id] = b"" if added[token_id].special else token.encode("utf-8")
            elif set(token) <= _BYTES.keys():
                tokens[token_id] = bytes(_BYTES[letter] for letter in token)
        return tokens

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and the ids for it into `directory`, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        text = self._backend.to_str(pretty=True)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        TokenIds(self.bos_id, self.end_id).write(directory)


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level BPE's tokens stands for, as GPT-2 has them.

    What is printable stands for itself, the others, in order, for 256 and on.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = (byte for byte in range(256) if byte not in own)
    return {chr(byte): byte for byte in own} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_letters()


def _reading(backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """The same backend to which some special tokens are none, so that texts may hold them."""
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] &= token["content"] not in tokens
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def load_tokenizer(location: str | Path, ids: TokenIds | None = None) -> Tokenizer:
    """Open the tokenizer in a directory, or of a model on the Hugging Face hub.

    Args:
        location: a checkpoint, what `Tokenizer.save` wrote, or a hub id.
        ids: where prompts begin and answers end, if the files there are not to say it.

    Raises:
        Blip2Error: no tokenizer there, or none that OPT could use.
    """
    directory = Path(location)
    if not directory.is_dir():
        directory = _download_tokenizer(str(location))
    try:
        files = read_tokenizer(directory)
    except Blip2Error:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise Blip2Error(
            f"cannot read the tokenizer in {directory}: {error}", f"make it again with: {EXPORT}"
        ) from None
    if files is None:
        raise Blip2Error(
            f"{directory} holds no tokenizer.json",
            f"make it with: {EXPORT}, or name another directory or hub id with `hf_model_location`",
        )
    if ids is None or not ids.are_stated:
        ids = TokenIds.beside(directory)
    if files.bos is not None and ids.bos not in (None, files.bos):
        raise Blip2Error(
            f"the tokenizer in {directory} puts token {files.bos} before a text, the checkpoint's"
            f" text_config token {ids.bos} (bos_token_id)",
            "set the latter to the former",
        )
    ids = TokenIds(files.bos if ids.bos is None else ids.bos, ids.eos)
    return Tokenizer(files.backend, ids, files.prompt_tokens)


def _download_tokenizer(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # hub, network and name errors share no base class
        raise Blip2Error(
            f"no tokenizer at {hub_id}: not a directory, and the hub says: {first_line(error)}",
            f"make one with: {EXPORT}, or name a directory with `hf_model_location`",
        ) from None


def build_input_ids(text_ids: list[int], num_query_tokens: int, vocab_size: int) -> torch.Tensor:
    """Put the picture's ids before the text's: 1-D int64, num_query_tokens + len(text_ids)."""
    picture = torch.arange(vocab_size, vocab_size + num_query_tokens)
    return torch.cat([picture, torch.tensor(text_ids, dtype=torch.int64)])


def check_length(prompt: str, token_ids: Sequence[int], max_txt_len: int) -> None:
    """A prompt is never cut silently.

    Raises:
        Blip2Error: it has more than `max_txt_len` tokens.
    """
    if len(token_ids) > max_txt_len:
        raise Blip2Error(
            f"the prompt {prompt!r} has {len(token_ids)} tokens, `max_txt_len` allows {max_txt_len}",
            "shorten `input_text` or raise `max_txt_len`",
        )

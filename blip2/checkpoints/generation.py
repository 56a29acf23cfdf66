"""With which tokens a checkpoint's answers begin and end.

transformers' BLIP-2 generates with its language model, whose settings are those of text_config: of
these bos_token_id and eos_token_id count. generation_config.json, and whatever else text_config says
of decoding, it does not read; nor is it read here, where run.py's flags decide, but that is said.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blip2 import artifacts
from blip2.checkpoints.reader import Checkpoint
from blip2.errors import Blip2Error
from blip2.layout import EXPORT

_FILE = "generation_config.json"
_OPT_DEFAULT = 2  # transformers' OPTConfig has </s> for both where a file leaves them out
# What changes no answer: transformers' own defaults, and settings of the computation.
_NEUTRAL = {
    "do_sample": False,
    "early_stopping": False,
    "length_penalty": 1,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "temperature": 1,
    "top_k": 50,
    "top_p": 1,
    "typical_p": 1,
}
_DECODING = (
    *_NEUTRAL,
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
)


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The ids before a text and at an answer's end; None where nothing says, as with LAVIS's.

    Then BLIP-2's own are meant, `</s>` and the newline.
    """

    bos: int | None = None
    eos: int | None = None

    @property
    def are_stated(self) -> bool:
        """Whether the checkpoint says where its answers end."""
        return self.eos is not None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TokenIds:
        """Those of a BLIP-2; an OPT alone, which is to follow LAVIS's BLIP-2, says nothing of it.

        Raises:
            Blip2Error: answers end by more tokens than one, or by none.
        """
        if checkpoint.is_of_lavis:
            return cls()
        return cls._of_config(checkpoint.path, checkpoint.config)

    @classmethod
    def beside(cls, tokenizer: Path) -> TokenIds:
        """Those for a directory's tokenizer: of its checkpoint, or as `write` left them.

        Raises:
            Blip2Error: as `of`, or a file is damaged.
        """
        if (tokenizer / "config.json").is_file():
            config = artifacts.read_json(tokenizer / "config.json", "downloading it again")
            return cls._of_config(tokenizer, config)
        path = tokenizer / _FILE
        if not path.is_file():
            return cls()
        made_by = EXPORT
        fields = artifacts.read_json(path, made_by)
        values = [fields.get(f"{name}_token_id") for name in ("bos", "eos")]
        if not all(type(value) is int and value >= 0 for value in values):
            raise Blip2Error(
                f"{path} holds no bos_token_id and eos_token_id", f"make it again with: {made_by}"
            )
        return cls(*values)

    def write(self, directory: Path) -> None:
        """Save both beside a tokenizer."""
        text = json.dumps({"bos_token_id": self.bos, "eos_token_id": self.eos}, indent=2)
        (directory / _FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def _of_config(cls, directory: Path, config: Mapping[str, Any]) -> TokenIds:
        if config.get("model_type") != "blip-2":
            return cls()
        path, text = directory / "config.json", config.get("text_config") or {}
        if not isinstance(text, dict):
            raise Blip2Error(f"in {path}, text_config is {text!r}", "download the checkpoint again")
        bos, eos = (text.get(f"{name}_token_id", _OPT_DEFAULT) for name in ("bos", "eos"))
        ends = eos if isinstance(eos, list) else [eos]
        for name, ids in (("eos", ends), ("bos", [] if bos is None else [bos])):
            if not all(type(value) is int and value >= 0 for value in ids):
                raise Blip2Error(
                    f"in {path}, text_config's {name}_token_id is {text.get(f'{name}_token_id')!r};"
                    " set it to the id of one token, by BLIP-2's custom of "
                    + ("the newline" if name == "eos" else "</s>")
                )
        if len(set(ends)) != 1:
            raise Blip2Error(
                f"in {path}, text_config ends answers by {len(set(ends))} tokens (eos_token_id"
                f" {eos}), this suite by one",
                "set it to that one",
            )
        _tell_what_is_not_read(directory, text, ends[0])
        return cls(bos, ends[0])


def _tell_what_is_not_read(directory: Path, text: Mapping[str, Any], eos: int) -> None:
    path = directory / _FILE
    fields = artifacts.read_json(path, "downloading it again") if path.is_file() else {}
    asked = dict(_decoding(text)) | dict(_decoding(fields))
    if fields.get("eos_token_id", eos) not in (eos, [eos]):
        asked["eos_token_id"] = fields["eos_token_id"]
    if asked:
        listed = ", ".join(f"{name} {value}" for name, value in asked.items())
        print(
            f"note: {directory} asks for {listed}, which BLIP-2 in transformers does not read, nor"
            " this suite; run.py's flags decide how to decode, text_config's eos_token_id"
            f" ({eos}) where to end",
            file=sys.stderr,
        )


def _decoding(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _DECODING:
        if fields.get(name) not in (None, _NEUTRAL.get(name)):
            yield name, fields[name]

"""What `trtllm-build` says of an engine in its config.json, checked before the engine is loaded."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from blip2 import artifacts
from blip2.errors import Blip2Error
from blip2.language.trtllm_format import ARCHITECTURE, DTYPES
from blip2.layout import BUILD_ENGINE

# The releases that build and run TensorRT engines and take the arguments used here.
OLDEST, FIRST_WITHOUT_ENGINES = (0, 13), (1, 3)
PAGED, CONTINUOUS = "paged", "continuous"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "world_size",
    "max_batch_size",
    "max_beam_width",
    "max_input_len",
    "max_seq_len",
)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """config.json of an OPT engine: `version`, parts of pretrained_config and of build_config.

    `max_prompt_embedding_table_size` is in rows: one a query token, for all requests of a batch
    together.
    """

    version: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    world_size: int
    max_batch_size: int
    max_beam_width: int
    max_input_len: int
    max_seq_len: int
    max_prompt_embedding_table_size: int
    kv_cache_type: str
    attention_plugin: bool
    packed_input: bool

    @classmethod
    def read(cls, engine_dir: Path) -> EngineConfig:
        """Read and check `engine_dir`.

        Raises:
            Blip2Error: missing, damaged, no OPT, no prompt table, a missing rank, or of a version
                of TensorRT-LLM other than 0.13 to 1.2.
        """
        path = engine_dir / "config.json"
        content = artifacts.read_json(path, BUILD_ENGINE)
        try:
            config = cls(**_fields(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise _bad_engine(path, f"{error} is missing or malformed") from None
        for name in _SIZES:
            value = getattr(config, name)
            if type(value) is not int or value < 1:
                raise _bad_engine(path, f"{name} is {value!r}")
        architecture = content["pretrained_config"].get("architecture")
        if architecture != ARCHITECTURE or config.dtype not in list(DTYPES):
            raise _bad_engine(path, f"the model is {architecture} in {config.dtype}, not OPT")
        check_version(config.version, f"{engine_dir} was built by")
        rows = config.max_prompt_embedding_table_size
        if type(rows) is not int or config.rows_per_request < 1:
            raise _bad_engine(
                path,
                f"max_prompt_embedding_table_size is {rows} for"
                f" max_batch_size {config.max_batch_size}; it must be query tokens x max_batch_size",
            )
        for rank in range(config.world_size):
            if not (engine_dir / f"rank{rank}.engine").is_file():
                raise _bad_engine(
                    engine_dir, f"rank{rank}.engine of {config.world_size} is missing"
                )
        return config

    @property
    def release(self) -> tuple[int, int]:
        """The first two numbers of `version`."""
        return _release_of(self.version)

    @property
    def rows_per_request(self) -> int:
        """Rows of the prompt table that each request may have.

        The executor gives every slot of the batch an equal share; the Python session looks at the
        sum only, and a full batch comes to the same.
        """
        return self.max_prompt_embedding_table_size // self.max_batch_size

    @property
    def runs_in_executor(self) -> bool:
        """Whether ModelRunnerCpp can run it; ModelRunner runs the others.

        The executor needs the attention plugin, packed input and a paged cache.
        """
        return self.kv_cache_type == PAGED and self.attention_plugin and self.packed_input

    @property
    def kv_cache_bytes(self) -> int:
        """Most that the keys and values of a full batch can take on one GPU."""
        tokens = self.max_batch_size * self.max_beam_width * self.max_seq_len
        values = 2 * self.num_hidden_layers * self.hidden_size // self.world_size
        return tokens * values * DTYPES[self.dtype].itemsize


def check_version(version: str, whose: str) -> None:
    """Refuse releases of TensorRT-LLM that cannot run OPT engines; `whose` begins the message."""
    release = _release_of(version)
    if release >= FIRST_WITHOUT_ENGINES:
        raise Blip2Error(
            f"{whose} TensorRT-LLM {version}, which no longer runs TensorRT engines (1.2.1 was the"
            " last to)",
            "install 1.2.1, or let the native session run OPT: give `opt_engine_dir` the"
            " output of opt/convert_checkpoint.py",
        )
    if release < OLDEST:
        raise Blip2Error(
            f"{whose} TensorRT-LLM {version}",
            "0.13 to 1.2.1 can be used: install one of those and"
            f" build the engine again with {BUILD_ENGINE}",
        )


def _release_of(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    pretrained, build = content["pretrained_config"], content["build_config"]
    plugins = build["plugin_config"]
    copied = ("dtype", *_SIZES[:4])
    limits = (*_SIZES[5:], "max_prompt_embedding_table_size")
    return {
        "version": str(content["version"]),
        **{name: pretrained[name] for name in copied},
        "world_size": pretrained["mapping"]["world_size"],
        **{name: build[name] for name in limits},
        # "PAGED", "paged" or "KVCacheType.PAGED", depending on the version; null is paged too.
        "kv_cache_type": str(build["kv_cache_type"] or PAGED).rpartition(".")[2].lower(),
        "attention_plugin": bool(plugins["gpt_attention_plugin"]),
        "packed_input": bool(plugins["remove_input_padding"]),
    }


def _bad_engine(path: Path, what: str) -> Blip2Error:
    return Blip2Error(f"in {path}, {what}", f"build the engine again with {BUILD_ENGINE}")

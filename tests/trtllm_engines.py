"""Engine directories for the double of TensorRT-LLM, and ways to install that double."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

DOUBLES = Path(__file__).parent / "doubles"
VERSIONS = ("0.13.0", "1.0.0", "1.2.1")


def write_engine(
    directory: Path,
    truth: Path,
    *,
    version: str = "1.2.1",
    kv_cache_type: str | None = "PAGED",
    world_size: int = 1,
    num_query_tokens: int = 4,
    dtype: str = "float32",
    **limits: int,
) -> Path:
    """Write config.json as trtllm-build does, and "engines" that point at a Hugging Face OPT."""
    opt = json.loads((truth / "config.json").read_text())
    max_batch_size = limits.setdefault("max_batch_size", 4)
    config: dict[str, Any] = {
        "version": version,
        "pretrained_config": {
            "architecture": "OPTForCausalLM",
            "dtype": dtype,
            **{
                name: opt[name]
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "max_position_embeddings",
                )
            },
            "mapping": {"world_size": world_size, "tp_size": world_size, "pp_size": 1},
            "quantization": {"quant_algo": None},
        },
        "build_config": {
            "max_input_len": 40,
            "max_seq_len": 60,
            "max_beam_width": 5,
            "max_prompt_embedding_table_size": num_query_tokens * max_batch_size,
            "kv_cache_type": kv_cache_type,
            "plugin_config": {"gpt_attention_plugin": "float16", "remove_input_padding": True},
            **limits,
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(world_size):
        (directory / f"rank{rank}.engine").write_text(str(truth))
    return directory


def install_metadata(directory: Path, version: str) -> Path:
    """Make `directory` a place where Python finds tensorrt_llm of that version installed."""
    metadata = directory / f"tensorrt_llm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    return directory


def install_double(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    version: str = "1.2.1",
    rank: int = 0,
    size: int = 1,
) -> None:
    """Install the double in this process, as process `rank` of `size`."""
    forget_double()
    monkeypatch.setenv("DOUBLE_MPI_RANK", str(rank))
    monkeypatch.setenv("DOUBLE_MPI_SIZE", str(size))
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.syspath_prepend(str(install_metadata(directory / version, version)))


def forget_double() -> None:
    """Let the next import find another version, and no calls."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def calls(method: str) -> list[dict]:
    """The arguments of the calls of a method of the double."""
    return [named for name, named in sys.modules["tensorrt_llm.runtime"].calls if name == method]

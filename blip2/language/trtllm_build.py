"""The `trtllm-build` command for a checkpoint, with the flags that a version of it has.

    print(build_command("opt/…/fp16/1-gpu", "trt_engine/…/fp16/1-gpu", config, num_query_tokens=32))

Sources: tensorrt_llm/commands/build.py of 0.9 to 1.2. What changed between them: 0.11 and 0.12
replaced --max_output_len by --max_seq_len, 0.13 --paged_kv_cache by --kv_cache_type, whose values
some releases before 1.2 all refuse: there the old flag, which they still take, asks for the other
cache. From 1.0 on the attention of prompts wants a paged cache, if it is not told otherwise.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from blip2.checkpoints import Checkpoint, QFormerConfig
from blip2.errors import Blip2Error
from blip2.language.trtllm_engine import CONTINUOUS, OLDEST, PAGED
from blip2.language.trtllm_format import OPTCheckpointConfig

NEWEST = "1.2.1"
# The query tokens of every published BLIP-2, for an OPT checkpoint that does not say.
BLIP2_QUERY_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """What an engine shall take at most; the defaults are the guide's for OPT-2.7B.

    The prompt table has a row for each query token of each request: `max_batch_size` times the
    query tokens, and it is that product which the engine must be built with.
    """

    max_batch_size: int = 8
    max_beam_width: int = 5
    max_input_len: int = 924
    max_output_len: int = 100

    @property
    def max_seq_len(self) -> int:
        """Longest input and answer together."""
        return self.max_input_len + self.max_output_len

    @classmethod
    def within(cls, max_position_embeddings: int) -> EngineLimits:
        """The defaults, shortened for a model that has fewer positions."""
        defaults = cls()
        if max_position_embeddings >= defaults.max_seq_len:
            return defaults
        output = min(defaults.max_output_len, max_position_embeddings // 2)
        return cls(max_input_len=max_position_embeddings - output, max_output_len=output)


def build_command(
    checkpoint_dir: str | Path,
    engine_dir: str | Path,
    config: OPTCheckpointConfig,
    num_query_tokens: int,
    version: str = NEWEST,
    limits: EngineLimits | None = None,
    kv_cache_type: str = PAGED,
) -> str:
    """The command, on several lines, that builds `checkpoint_dir`'s engine into `engine_dir`.

    Args:
        checkpoint_dir: what opt/convert_checkpoint.py wrote.
        engine_dir: where rank{r}.engine and config.json shall go.
        config: the checkpoint's.
        num_query_tokens: rows of the Q-Former's output, for one picture.
        version: of TensorRT-LLM, 0.9 to 1.2.1.
        limits: what the engine shall take; None is the guide's, as far as the model goes.
        kv_cache_type: PAGED, for the executor, or CONTINUOUS, for the Python session.

    Raises:
        Blip2Error: a version that has no such command.
    """
    release = parse_version(version)
    limits = limits or EngineLimits.within(config.max_position_embeddings)
    flags = {
        "checkpoint_dir": checkpoint_dir,
        "output_dir": engine_dir,
        "gpt_attention_plugin": config.dtype,
        "gemm_plugin": config.dtype,
        "remove_input_padding": "enable",
        **_cache_flags(release, kv_cache_type),
        "max_batch_size": limits.max_batch_size,
        "max_beam_width": limits.max_beam_width,
        "max_input_len": limits.max_input_len,
        **_length_flags(release, limits),
        # A full batch of the longest inputs in one step, which the Python session asks for.
        "max_num_tokens": limits.max_batch_size * limits.max_input_len,
        "max_prompt_embedding_table_size": num_query_tokens * limits.max_batch_size,
    }
    if config.tp_size > 1:
        flags["workers"] = config.tp_size
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return "trtllm-build " + " \\\n    ".join(words)


def parse_version(version: str) -> tuple[int, int]:
    """Major and minor number of a TensorRT-LLM release; Blip2Error outside 0.9 to 1.2."""
    found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", version)
    release = (int(found[1]), int(found[2])) if found else None
    if release is None or not (0, 9) <= release <= (1, 2):
        raise Blip2Error(
            f"no trtllm-build for OPT in TensorRT-LLM {version}",
            f"name a release from 0.9 to {NEWEST}",
        )
    return release


def runs_here(version: str) -> bool:
    """Whether run.py can run the engine that `version` builds."""
    return parse_version(version) >= OLDEST


def query_tokens(checkpoint: Checkpoint) -> int:
    """Query tokens of a BLIP-2 checkpoint; an OPT does not say, and has BLIP-2's number."""
    if checkpoint.kind == "opt":
        return BLIP2_QUERY_TOKENS
    return QFormerConfig.of(checkpoint).num_query_tokens


def _cache_flags(release: tuple[int, int], kv_cache_type: str) -> dict[str, str]:
    if release < (0, 13):
        return {"paged_kv_cache": "enable" if kv_cache_type == PAGED else "disable"}
    if kv_cache_type == PAGED:  # what they build unasked
        return {}
    old_flag = {"paged_kv_cache": "disable"}
    flags = {"kv_cache_type": CONTINUOUS} if release >= (1, 2) else old_flag
    return flags | ({"use_paged_context_fmha": "disable"} if release >= (1, 0) else {})


def _length_flags(release: tuple[int, int], limits: EngineLimits) -> dict[str, int]:
    if release >= (0, 11):
        return {"max_seq_len": limits.max_seq_len}
    return {"max_output_len": limits.max_output_len}

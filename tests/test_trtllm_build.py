"""The printed trtllm-build command has the flags of the version it is for, and the right numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess

import pytest
from conftest import ROOT
from trtllm_engines import DOUBLES, install_metadata

from blip2.errors import Blip2Error
from blip2.language.trtllm_build import EngineLimits, build_command
from blip2.language.trtllm_engine import CONTINUOUS, PAGED, EngineConfig
from blip2.language.trtllm_format import OPTCheckpointConfig

OPT_2_7B = OPTCheckpointConfig(
    dtype="float16",
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_size=2560,
    vocab_size=50304,
    max_position_embeddings=2048,
)
COMMON = {
    "checkpoint_dir": "checkpoint",
    "output_dir": "engine",
    "gpt_attention_plugin": "float16",
    "gemm_plugin": "float16",
    "remove_input_padding": "enable",
    "max_batch_size": "8",
    "max_beam_width": "5",
    "max_input_len": "924",
    "max_num_tokens": "7392",
    "max_prompt_embedding_table_size": "256",
}


def flags(config=OPT_2_7B, query_tokens=32, **named) -> dict[str, str]:
    """The command, read as a shell would read it."""
    command = build_command("checkpoint", "engine", config, query_tokens, **named)
    program, *words = shlex.split(command.replace("\\\n", ""))
    assert program == "trtllm-build"
    assert all(word.startswith("--") for word in words[::2])
    return dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))


@pytest.mark.parametrize("version", ["0.13.0", "0.14", "0.21.0", "1.0.0", "1.2.1"])
def test_the_flags_of_0_13_to_1_2(version):
    """A paged cache is what they build unasked, and some refuse to be asked."""
    assert flags(version=version) == {**COMMON, "max_seq_len": "1024"}


def test_the_newest_version_is_the_default():
    assert flags() == flags(version="1.2.1")


@pytest.mark.parametrize("version", ["0.9.0", "0.10"])
def test_the_flags_of_0_9_and_0_10(version):
    assert flags(version=version) == {**COMMON, "max_output_len": "100", "paged_kv_cache": "enable"}


@pytest.mark.parametrize("version", ["0.11.0", "0.12.0"])
def test_the_flags_of_0_11_and_0_12(version):
    assert flags(version=version) == {**COMMON, "max_seq_len": "1024", "paged_kv_cache": "enable"}


@pytest.mark.parametrize(
    "version, expected",
    [
        ("0.12.0", {"paged_kv_cache": "disable"}),
        ("0.13.0", {"paged_kv_cache": "disable"}),
        ("0.20.0", {"paged_kv_cache": "disable"}),
        ("1.0.0", {"paged_kv_cache": "disable", "use_paged_context_fmha": "disable"}),
        ("1.2.1", {"kv_cache_type": "continuous", "use_paged_context_fmha": "disable"}),
    ],
)
def test_the_flags_of_a_continuous_cache(version, expected):
    found = flags(version=version, kv_cache_type=CONTINUOUS)
    assert found == {**COMMON, "max_seq_len": "1024", **expected}


@pytest.mark.parametrize("version", ["0.8.0", "1.3.0", "2.0", "newest", "", "1.2.1; rm"])
def test_versions_without_the_command_are_refused(version):
    with pytest.raises(Blip2Error, match=r"name a release from 0.9 to 1.2.1"):
        flags(version=version)


def test_the_pages_command_is_the_one_that_is_printed():
    page = (ROOT / "docs" / "tensorrt.md").read_text()
    command = page[page.index("trtllm-build --checkpoint_dir") :].partition("\npython run.py")[0]
    _, *words = shlex.split(command.replace("\\\n", ""))
    found = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
    directories = {name: found[name] for name in ("checkpoint_dir", "output_dir")}
    assert found == {**flags(), **directories}


def test_the_table_has_a_row_for_each_query_token_of_each_request():
    limits = EngineLimits(max_batch_size=3)
    assert flags(query_tokens=7, limits=limits)["max_prompt_embedding_table_size"] == "21"


@pytest.mark.parametrize(
    "positions, expected", [(1024, (924, 100)), (96, (48, 48)), (300, (200, 100))]
)
def test_lengths_stay_within_the_models_positions(positions, expected):
    limits = EngineLimits.within(positions)
    assert (limits.max_input_len, limits.max_output_len) == expected
    assert limits.max_seq_len <= positions


def test_an_engine_for_several_gpus_is_built_for_all_of_them_at_once():
    assert flags(dataclasses.replace(OPT_2_7B, tp_size=2))["workers"] == "2"


@pytest.mark.parametrize("kv_cache_type", [PAGED, CONTINUOUS])
@pytest.mark.parametrize("version", ["0.13.0", "0.20.0", "1.0.0", "1.2.1"])
def test_the_builder_takes_the_command_and_makes_what_is_asked_for(
    tmp_path, version, kv_cache_type
):
    """The builder is a double, with the flags that each release has, and the values it refuses."""
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(OPT_2_7B.to_json()))
    (checkpoint / "rank0.safetensors").touch()
    named = {"version": version, "kv_cache_type": kv_cache_type}
    command = build_command(checkpoint, engine, OPT_2_7B, 32, **named)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": f"{DOUBLES / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(install_metadata(tmp_path / "site", version)),
        },
    )
    assert done.returncode == 0, done.stderr
    config = EngineConfig.read(engine)
    assert (config.version, config.kv_cache_type) == (version, kv_cache_type)
    assert config.runs_in_executor == (kv_cache_type == PAGED)
    assert (config.rows_per_request, config.max_beam_width) == (32, 5)


def test_a_directory_with_spaces_survives_the_shell():
    assert "'my engines/fp16'" in build_command("checkpoint", "my engines/fp16", OPT_2_7B, 32)

"""Small random OPTs and BLIP-2s, as transformers makes them: the truth that tests compare with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, OPTForCausalLM

ROOT = Path(__file__).parent.parent
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}
POST_LN = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}


def opt(seed: int = 0, spread: float = 0.2, **shape: Any) -> OPTForCausalLM:
    """An OPT in float32 whose weights, biases and norms all differ from what is initialised."""
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**{**SHAPE, **shape}, init_std=spread)).eval()
    _randomise(model, spread)
    return model


def blip2(seed: int = 0, num_query_tokens: int = 4, **shape: Any) -> Blip2ForConditionalGeneration:
    """A BLIP-2 with `opt`'s language model and a minute ViT and Q-Former."""
    torch.manual_seed(seed)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = Blip2Config(
        vision_config={"hidden_size": 16, "image_size": 28, **small},
        qformer_config={"hidden_size": 24, "vocab_size": 9, **small},
        text_config={"model_type": "opt", **SHAPE, **shape},
        num_query_tokens=num_query_tokens,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    _randomise(model, 0.2)
    return model


def save_pickles(model: torch.nn.Module, directory: Path, shards: int = 1) -> None:
    """Write config.json and pytorch_model.bin, or that many shards and their index."""
    import json

    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    names = list(state)
    files = {name: f"pytorch_model-{i % shards + 1:05}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: state[name].clone() for name in names if files[name] == file}
        torch.save(part, directory / file)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one of the suite's scripts as a user would."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def _randomise(model: torch.nn.Module, spread: float) -> None:
    # Fresh biases are 0 and norms 1: a mistake in their order would not show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * spread
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)

"""A BLIP-2 OPT-2.7B of random weights on a GPU: in transformers, and in this suite's sessions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

from blip2.checkpoints import open_checkpoint
from blip2.devices import has_float8
from blip2.language.conversion import ConversionOptions, convert, target_config
from blip2.language.native.model import OPTModel
from blip2.language.native.packing import PackedLinear
from blip2.language.native.session import NativeSession
from blip2.language.trtllm_format import FLOAT8_ALGO
from blip2.vision import modules
from blip2.vision.cuda import CudaVisionTransformer
from blip2.vision.float8 import quantise_linears
from blip2.vision.torch_session import Graphs, TorchSession, open_checkpoint_session

DEVICE = "cuda"
PRECISIONS = {"float16": None, "INT8": "W8A16", "INT4": "W4A16"}
FLOAT8 = "FP8"


def random_model(directory: Path) -> Blip2ForConditionalGeneration:
    """A BLIP-2 OPT-2.7B with random weights, in `directory`, and read as users read it: float16."""
    text = OPTConfig(
        vocab_size=50272,
        hidden_size=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        word_embed_proj_dim=2560,
    )
    config = Blip2Config(text_config=text.to_dict(), image_token_index=50265)
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.float16)
        model = Blip2ForConditionalGeneration(config).eval()
        torch.set_default_dtype(torch.float32)
    # Biases begin as zeros, and so do the ViT's weights, for which a GPU needs less power and time.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.startswith("vision_model."):
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.query_tokens.data.normal_()
    model.save_pretrained(directory)
    del model
    model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float16)
    return model.to(DEVICE).eval()


def open_sessions(directory: Path) -> tuple[TorchSession, dict[str, NativeSession]]:
    """The sessions that run.py would open, from converted checkpoints."""
    vision = open_checkpoint_session(directory, directory)
    timed("load ViT and Q-Former", vision.load)
    checkpoint = open_checkpoint(directory)
    languages = {}
    for name, quant_algo in PRECISIONS.items():
        config = target_config(checkpoint, ConversionOptions(quant_algo=quant_algo))
        target = directory / name
        if not languages:
            first = target
            timed("convert OPT", convert, checkpoint, config, target, 8)
        else:  # the same tensors: they are quantised when they are loaded
            target.mkdir()
            for file in first.glob("rank0*"):
                (target / file.name).symlink_to(file)
            (target / "config.json").write_text(json.dumps(config.to_json()))
        languages[name] = NativeSession(target)
        timed(f"load OPT, {name}", languages[name].load)
    if has_float8(torch.device(DEVICE)):
        config = target_config(checkpoint, ConversionOptions(quant_algo=FLOAT8_ALGO))
        target = directory / FLOAT8
        timed("convert OPT, FP8", convert, checkpoint, config, target, 8)
        languages[FLOAT8] = NativeSession(target)
        timed("load OPT, FP8", languages[FLOAT8].load)
    return vision, languages


def in_float8(vision: TorchSession, directory: Path) -> TorchSession | None:
    """A loaded session, but with all layers of its ViT in FP8; None where the GPU has none."""
    device = torch.device(DEVICE)
    if not has_float8(device):
        return None
    vit = modules.load_vision_transformer(open_checkpoint(directory), torch.float16, device)
    quantise_linears(vit.encoder)
    session = copy.copy(vision)
    session._stages = dataclasses.replace(vision._stages, vit=Graphs(CudaVisionTransformer(vit)))
    return session


def timed(name: str, function: Callable, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    torch.cuda.synchronize()
    print(f"{name:<34} {time.perf_counter() - started:>8.1f} s", flush=True)
    return result


class FloatOf:
    """y = x Wᵀ + b in float32, on the weights that a packed linear stands for."""

    def __init__(self, linear: PackedLinear) -> None:
        self._linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._linear.bias is None else self._linear.bias.float()
        return torch.nn.functional.linear(x, self._linear.unpacked().float(), bias)


def float_weights(weights):
    """The same weights for `OPTModel` in float32."""

    def floats(part):
        if isinstance(part, PackedLinear):
            return FloatOf(part)
        if isinstance(part, torch.Tensor):
            return part.float()
        if isinstance(part, tuple):
            return tuple(map(floats, part))
        return type(part)(**{name: floats(value) for name, value in vars(part).items()})

    return floats(weights)


def parameters(opt: OPTModel) -> int:
    """Of the layers' linears, which every token of a prompt is multiplied with."""
    *layers, _head = opt.weights.linears()
    return sum(math.prod(linear.shape) for linear in layers)


def weight_bytes(opt: OPTModel) -> int:
    """Read by one step."""
    return sum(linear.weight.nbytes for linear in opt.weights.linears())


def cache_bytes(opt: OPTModel, tokens: int) -> int:
    return 2 * 2 * opt.config.num_hidden_layers * opt.config.hidden_size * tokens

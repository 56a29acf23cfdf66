"""ViT-g and the Q-Former on a CPU: of transformers, and as this suite runs what it exports."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import ClassVar

import torch

from bench.cpu_limits import Run
from bench.cpu_opt import WIDTH
from bench.cpu_work import Work, filled
from blip2 import bfloat16, cpu
from blip2.checkpoints import QFormerConfig, VisionConfig

EXPORTS = {  # name: onnx_export.py's --dtype, and --opset
    "float32 files": (torch.float32, 18),
    "float32 files, opset 23": (torch.float32, 23),
    "float16 files": (torch.float16, 18),
    "INT8 files": (torch.int8, 18),
}


@dataclasses.dataclass(frozen=True)
class VitStage:
    """pixel_values → image_embeds."""

    config: VisionConfig
    dtypes: ClassVar = (torch.float32, torch.float16, torch.int8)

    def transformers(self, dtype: torch.dtype) -> Work:
        import transformers

        config = transformers.Blip2VisionConfig(**dataclasses.asdict(self.config))
        with torch.device("meta"):
            model = transformers.Blip2VisionModel(config)
        model = filled(model, dtype)

        def start(pictures: int) -> Run:
            pixels = self.inputs(pictures)["input"].to(dtype)
            return torch.inference_mode()(lambda: model(pixels).last_hidden_state)

        return Work(start, self.operations)

    def ours(self, dtype: torch.dtype, opset: int) -> Work:
        from blip2.vision.modules import VisionTransformer

        with torch.device("meta"):
            module = VisionTransformer(self.config)
        return our_work(module, self, dtype, opset)

    def inputs(self, pictures: int) -> dict[str, torch.Tensor]:
        size = self.config.image_size
        return {"input": torch.randn(pictures, 3, size, size)}

    def operations(self, pictures: int) -> float:
        config, tokens = self.config, self.config.num_tokens
        weights = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
        layer = 2 * tokens * weights + 4 * tokens**2 * config.hidden_size
        patches = 2 * (tokens - 1) * config.hidden_size * 3 * config.patch_size**2
        return pictures * (config.num_hidden_layers * layer + patches)


@dataclasses.dataclass(frozen=True)
class QFormerStage:
    """image_embeds → query_output."""

    config: QFormerConfig
    dtypes: ClassVar = (torch.float32, torch.float16)

    def transformers(self, dtype: torch.dtype) -> Work:
        import transformers

        fields = dataclasses.asdict(self.config)
        del fields["num_query_tokens"]
        with torch.device("meta"):
            model = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**fields))
            projection = torch.nn.Linear(self.config.hidden_size, WIDTH)
        model, projection = filled(model, dtype), filled(projection, dtype)

        def start(pictures: int) -> Run:
            queries, embeds, visible = self.inputs(pictures).values()

            @torch.inference_mode()
            def run() -> object:
                output = model(
                    query_embeds=queries.to(dtype),
                    encoder_hidden_states=embeds.to(dtype),
                    encoder_attention_mask=visible,
                )
                return projection(output.last_hidden_state)

            return run

        return Work(start, self.operations)

    def ours(self, dtype: torch.dtype, opset: int) -> Work:
        from blip2.vision.modules import QFormer

        with torch.device("meta"):
            module = QFormer(self.config, WIDTH)
        return our_work(module, self, dtype, opset)

    def inputs(self, pictures: int) -> dict[str, torch.Tensor]:
        tokens, queries = VisionConfig().num_tokens, self.config.num_query_tokens
        return {
            "query_tokens": torch.randn(pictures, queries, self.config.hidden_size),
            "image_embeds": torch.randn(pictures, tokens, self.config.encoder_hidden_size),
            "image_atts": torch.ones(pictures, tokens, dtype=torch.int64),
        }

    def operations(self, pictures: int) -> float:
        config, tokens = self.config, VisionConfig().num_tokens
        width, queries, layers = (
            config.hidden_size,
            config.num_query_tokens,
            range(config.num_hidden_layers),
        )
        crossing = len([layer for layer in layers if layer % config.cross_attention_frequency == 0])
        own = (
            2
            * queries
            * (4 * width**2 + 2 * width * config.intermediate_size + 2 * queries * width)
        )
        cross = 2 * queries * (2 * width**2 + 2 * tokens * width)
        cross += 2 * tokens * 2 * width * config.encoder_hidden_size
        return pictures * (len(layers) * own + crossing * cross + 2 * queries * width * WIDTH)


def computed_in(dtype: torch.dtype) -> str:
    """What files of a --dtype are computed in on this CPU, as `cpu_limits.product_rate` calls it."""
    if dtype != torch.float32 and cpu.is_fast_in_bfloat16():
        return "bfloat16"
    return "int8" if dtype == torch.int8 else "float32"


def our_work(
    module: torch.nn.Module, stage: VitStage | QFormerStage, dtype: torch.dtype, opset: int
) -> Work:
    """A stage's module as run.py runs what onnx_export.py makes of it: a graph, or in bfloat16."""
    module = filled(module, torch.float32)
    if computed_in(dtype) == "bfloat16":
        return _module_work(module, stage)
    return _graph_work(module, stage, dtype, opset)


def _module_work(module: torch.nn.Module, stage: VitStage | QFormerStage) -> Work:
    from blip2.vision import bf16

    bf16.use_bfloat16(module)
    weights, packs = module.state_dict(), bf16.packed_weights(module)
    packed = {name: bfloat16.packed(weights[name]) for name in packs}
    module.load_state_dict(packed, strict=False, assign=True)

    def start(pictures: int) -> Run:
        given = stage.inputs(pictures).values()
        return torch.inference_mode()(lambda: module(*given))

    return Work(start, stage.operations)


def _graph_work(
    module: torch.nn.Module, stage: VitStage | QFormerStage, dtype: torch.dtype, opset: int
) -> Work:
    from blip2.vision.export import dtype_between, narrow, write_graph
    from blip2.vision.onnx_runtime import open_graph, run_graph

    def inputs(pictures: int) -> dict[str, torch.Tensor]:
        between = dtype_between(dtype)
        given = stage.inputs(pictures)
        return {k: x.to(between) if x.is_floating_point() else x for k, x in given.items()}

    narrow(module, dtype)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph.onnx"
        write_graph(module, inputs(2), "output", path, opset)
        graph = open_graph(path, is_int8=dtype == torch.int8)

    def start(pictures: int) -> Run:
        given = inputs(pictures)
        return lambda: run_graph(graph, given)

    return Work(start, stage.operations)

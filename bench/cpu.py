"""BLIP-2's stages on this machine's CPU, against transformers in the same run.

    python -m bench.cpu opt                      # decoding steps: 11 GB, some minutes
    python -m bench.cpu opt --layers 8           # a quarter of the layers, for a quarter of both
    python -m bench.cpu vit                      # ViT-g and the Q-Former: 9 GB
    python -m bench.cpu demo                     # answers of the demo model, as `make demo` left it

Random weights of BLIP-2 OPT-2.7B's shapes. Prints milliseconds, the bandwidth at which a step reads
the weights and its share of what a plain sum over memory reaches in the same run (for the ViT and
the Q-Former: arithmetic, and its share of what a large matrix product reaches), and how many times
as fast as transformers in float32 and in bfloat16 that is.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not with -m

import torch

from blip2 import cli
from blip2.checkpoints import QFormerConfig, VisionConfig
from blip2.engines import Places
from blip2.errors import Blip2Error
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights
from blip2.language.native.linear import Linear
from blip2.language.native.model import OPTModel, packing
from blip2.language.trtllm_format import OPTCheckpointConfig
from blip2.pipeline import Pipeline, open_pipeline

WIDTH, HEADS, VOCABULARY, POSITIONS = 2560, 32, 50272, 2048
CONTEXT = 40  # tokens before the step
REFERENCES = ("transformers float32", "transformers bfloat16")
NATIVE = {  # name: the checkpoint's type, bits of the layers, bits of the head
    "native float32": (torch.float32, None, None),
    "native float16": (torch.float16, None, None),
    "native INT8": (torch.float16, 8, 8),
    "native INT4": (torch.float16, 4, 8),
}
ONNX = {  # name: onnx_export.py's --dtype, and --opset
    "ONNX float32": (torch.float32, 18),
    "ONNX float32, opset 23": (torch.float32, 23),
    "ONNX float16": (torch.float16, 18),
    "ONNX INT8": (torch.int8, 18),
}
DEMO = Path(__file__).resolve().parent.parent / "demo"
DEMO_TEXTS = ("", "Question: What colour is the circle? Answer:")

Run = Callable[[], object]


@dataclasses.dataclass
class Work:
    """Something to time: `start(rows)` prepares a run; `cost(rows)` is its bytes, or operations."""

    start: Callable[[int], Run]
    cost: Callable[[int], float]


class Table:
    """Times each work at each number of rows and prints a line for it."""

    def __init__(self, title: str, limit: float, unit: str, args: argparse.Namespace) -> None:
        self._limit, self._args = limit, args
        self._times: dict[tuple[str, int], float] = {}
        print(f"\n{title}: at most {limit / 1e9:.1f} {unit}, {torch.get_num_threads()} threads")
        print(f"{'':<24}{'rows':>5}{'ms':>10}{unit:>9}{'share':>7}{'float32':>9}{'bfloat16':>9}")

    def add(self, name: str, make: Callable[[], Work]) -> None:
        """`make` is called here, so that only one model is in memory at a time."""
        work = make()
        for rows in self._args.rows:
            seconds = median_seconds(work.start(rows), self._args.repeats)
            self._times[name, rows] = seconds
            rate = work.cost(rows) / seconds
            ratios = (self._times.get((other, rows), 0) / seconds for other in REFERENCES)
            print(
                f"{name:<24}{rows:>5}{seconds * 1e3:>10.1f}{rate / 1e9:>9.1f}"
                f"{rate / self._limit:>7.0%}",
                *(f"{ratio:>8.2f}x" if ratio else f"{'':>9}" for ratio in ratios),
                sep="",
                flush=True,
            )
        del work
        gc.collect()


def main() -> None:
    parser = cli.ArgumentParser("Time BLIP-2's stages on a CPU against transformers.")
    parser.add_argument("stage", choices=STAGES, help="what to time")
    parser.add_argument(
        "--layers", type=cli.positive_int, default=39, help="at most so many a model"
    )
    parser.add_argument("--repeats", type=cli.positive_int, default=5, help="to take the median of")
    parser.add_argument("--rows", type=cli.positive_int, nargs="+", help="steps' rows, or pictures")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="lines with one of these in the name",
    )
    args = parser.parse_args()
    STAGES[args.stage](args)


def opt(args: argparse.Namespace) -> None:
    """Decoding steps of one prompt's rows: beams, or requests."""
    args.rows = args.rows or [1, 5, 8, 40]  # 8 requests of 5 beams
    layers = min(args.layers, 32)
    table = Table(f"OPT-2.7B, {layers} layers, a step", memory_bandwidth(), "GB/s", args)
    for name in REFERENCES:
        dtype = getattr(torch, name.split()[1])
        if chosen(name, args):
            table.add(name, lambda dtype=dtype: transformers_step(layers, dtype))
    for name, precision in NATIVE.items():
        if chosen(name, args):
            table.add(name, lambda precision=precision: native_step(layers, *precision))


def vit(args: argparse.Namespace) -> None:
    """Both stages before OPT, for one picture and for several."""
    args.rows = args.rows or [1, 4]
    limit = matmul_rate()
    vision = VisionConfig(num_hidden_layers=min(args.layers, 39))
    qformer = QFormerConfig(num_hidden_layers=min(args.layers, 12))
    for title, stage in (
        (f"ViT-g, {vision.num_hidden_layers} layers", VitStage(vision)),
        (f"Q-Former, {qformer.num_hidden_layers} layers", QFormerStage(qformer)),
    ):
        table = Table(title, limit, "GFLOP/s", args)
        for name in REFERENCES:
            dtype = getattr(torch, name.split()[1])
            if chosen(name, args):
                table.add(name, lambda dtype=dtype, stage=stage: stage.transformers(dtype))
        for name, precision in ONNX.items():
            if chosen(name, args) and precision[0] in stage.onnx_dtypes:
                table.add(name, lambda how=precision, stage=stage: stage.onnx(*how))


def demo(args: argparse.Namespace) -> None:
    """Milliseconds from a picture to an answer of the demo model."""
    import transformers

    from blip2.images import load_image, pixel_values
    from blip2.language import GenerationOptions

    out = DEMO / "out"
    if not (out / "opt" / "fp16").exists():
        command = shlex.join(["make", "-C", str(DEMO.parent), "demo"])
        raise Blip2Error(f"{out} holds no engines", f"make them with: {command}")
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(DEMO / "checkpoint").eval()

    def reference(pipeline: Pipeline, pixels: torch.Tensor, text: str) -> Run:
        tokens = [model.config.image_token_id] * pipeline.vision.num_query_tokens
        ids = torch.tensor([[*tokens, 2, *pipeline.tokenizer.encode(text)]])
        return torch.inference_mode()(
            lambda: model.generate(
                pixel_values=pixels,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=pipeline.tokenizer.end_id,
            )
        )

    def ours(pipeline: Pipeline, pixels: torch.Tensor, text: str) -> Run:
        end_id, pad_id = pipeline.tokenizer.end_id, pipeline.tokenizer.pad_id
        options = GenerationOptions(end_id=end_id, pad_id=pad_id, max_output_len=40)
        return lambda: pipeline.answer(pixels, [text], options)

    print(f"{'demo':<22}", *(f"{text or '(caption)':>46}" for text in DEMO_TEXTS), sep="")
    first: list[float] = []
    engines = [(f"ours, {name}", name, ours) for name in ("fp16", "int8", "int4")]
    for name, opt_directory, make in [("transformers float32", "fp16", reference), *engines]:
        if not (out / "opt" / opt_directory).exists():
            continue
        pipeline = open_pipeline(
            Places.of(out / "onnx", out / "opt" / opt_directory, out / "query_tokens.pt")
        )
        picture = load_image(DEMO / "scene.png")
        pixels = pixel_values(picture, pipeline.vision.preprocessing)[None]
        seconds = [
            median_seconds(make(pipeline, pixels, text), args.repeats) for text in DEMO_TEXTS
        ]
        first = first or seconds
        pairs = zip(first, seconds, strict=True)
        cells = (f"{time * 1e3:>35.1f} ms {before / time:>6.2f}x" for before, time in pairs)
        print(f"{name:<22}", *cells, sep="", flush=True)


STAGES = {"opt": opt, "vit": vit, "demo": demo}


def chosen(name: str, args: argparse.Namespace) -> bool:
    return any(word in name for word in args.only)


def memory_bandwidth() -> float:
    """Bytes a second that a sum over 1 GiB reads."""
    memory = torch.ones(1 << 28)
    return memory.nbytes / median_seconds(lambda: memory.sum(), 7)


def matmul_rate() -> float:
    """Operations a second of the best of torch's and ONNX Runtime's products of 2048 x 2048."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    size = 2048
    a = torch.randn(size, size)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [value("x", TensorProto.FLOAT, [size, size])],
        [value("y", TensorProto.FLOAT, [size, size])],
        [numpy_helper.from_array(a.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {"x": np.ascontiguousarray(a.numpy())}
    seconds = (median_seconds(lambda: a @ a, 5), median_seconds(lambda: session.run(None, feed), 5))
    return 2 * size**3 / min(seconds)


def median_seconds(run: Run, repeats: int) -> float:
    """Median wall time of `run`, after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


_POOL = torch.empty(1 << 24).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite with random values from a pool: drawing billions would take minutes.

    Each call begins elsewhere in the pool, or ONNX Runtime would keep equal weights once.
    """
    flat = tensor.view(-1)
    first = torch.randint(len(_POOL), ()).item()
    for start in range(-first, len(flat), len(_POOL)):
        part = flat[max(start, 0) : start + len(_POOL)]
        part.copy_(_POOL[max(-start, 0) :][: len(part)])
    return tensor


def filled(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module made on the meta device, with random weights on the CPU."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        elif "position_ids" in name:
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    for name, parameter in model.named_parameters():
        fill(parameter.data)
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data += 1
    return model


def transformers_step(layers: int, dtype: torch.dtype) -> Work:
    """Appends one token to so many rows of OPTForCausalLM."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=POSITIONS,
    )
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    model.tie_weights()
    model = filled(model, dtype)
    model.tie_weights()

    def start(rows: int) -> Run:
        prompt = torch.randint(VOCABULARY, (1, CONTEXT))
        token = torch.randint(VOCABULARY, (rows, 1))
        with torch.inference_mode():
            cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(rows)

        @torch.inference_mode()
        def step() -> object:
            output = model(token, past_key_values=cache, use_cache=True)
            cache.crop(-1)
            return output

        return step

    weight_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return Work(start, lambda _: weight_bytes)


def native_step(layers: int, dtype: torch.dtype, bits: int | None, head_bits: int | None) -> Work:
    """The same of the native model."""
    config = OPTCheckpointConfig(
        dtype=str(dtype).removeprefix("torch."),
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
    )
    device = torch.device("cpu")

    def draw(*shape: int) -> torch.Tensor:
        return fill(torch.empty(shape, dtype=dtype))

    def linear(channels: int, inputs: int) -> Linear:
        return pack(draw(channels, inputs), draw(channels), bits)

    def norm() -> Norm:
        return Norm(1 + draw(WIDTH).float(), draw(WIDTH).float())

    embedding = draw(VOCABULARY, WIDTH)
    with packing(config, device) as pack:
        weights = OPTWeights(
            embedding=embedding,
            positions=draw(POSITIONS, WIDTH).float(),
            layers=tuple(
                Layer(
                    input_norm=norm(),
                    qkv=linear(3 * WIDTH, WIDTH),
                    dense=linear(WIDTH, WIDTH),
                    post_norm=norm(),
                    fc=linear(4 * WIDTH, WIDTH),
                    proj=linear(WIDTH, 4 * WIDTH),
                )
                for _ in range(layers)
            ),
            final_norm=norm(),
            head=pack(embedding, None, head_bits),
        )
    model = OPTModel(config, weights)

    def start(rows: int) -> Run:
        lengths = torch.tensor([CONTEXT])
        cache = model.new_cache(lengths, rows, 64)
        prompt = torch.randint(VOCABULARY, (1, CONTEXT))
        tokens = torch.randint(VOCABULARY, (rows,))
        with torch.inference_mode(), model.computing():
            model.prefill(prompt, lengths, torch.zeros(1, 0, WIDTH), cache)

        @torch.inference_mode()
        def step() -> object:
            with model.computing():
                return model.step(tokens, cache)

        return step

    stored = 8 * dtype.itemsize
    weight_bytes = layers * 12 * WIDTH**2 * (bits or stored) // 8
    weight_bytes += embedding.numel() * (head_bits or stored) // 8
    return Work(start, lambda _: weight_bytes)


@dataclasses.dataclass(frozen=True)
class VitStage:
    """pixel_values → image_embeds."""

    config: VisionConfig
    onnx_dtypes: ClassVar = (torch.float32, torch.float16, torch.int8)

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

    def onnx(self, dtype: torch.dtype, opset: int) -> Work:
        from blip2.vision.modules import VisionTransformer

        with torch.device("meta"):
            module = VisionTransformer(self.config)
        return onnx_work(module, self, dtype, opset)

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
    onnx_dtypes: ClassVar = (torch.float32, torch.float16)

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

    def onnx(self, dtype: torch.dtype, opset: int) -> Work:
        from blip2.vision.modules import QFormer

        with torch.device("meta"):
            module = QFormer(self.config, WIDTH)
        return onnx_work(module, self, dtype, opset)

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


def onnx_work(
    module: torch.nn.Module, stage: VitStage | QFormerStage, dtype: torch.dtype, opset: int
) -> Work:
    """A stage's module, exported and run as onnx_export.py and run.py do."""
    from blip2.vision.export import dtype_between, narrow, write_graph
    from blip2.vision.onnx_runtime import open_graph, run_graph

    def inputs(pictures: int) -> dict[str, torch.Tensor]:
        between = dtype_between(dtype)
        given = stage.inputs(pictures)
        return {k: x.to(between) if x.is_floating_point() else x for k, x in given.items()}

    module = filled(module, torch.float32)
    narrow(module, dtype)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph.onnx"
        write_graph(module, inputs(2), "output", path, opset)
        del module
        graph = open_graph(path)

    def start(pictures: int) -> Run:
        given = inputs(pictures)
        return lambda: run_graph(graph, given)

    return Work(start, stage.operations)


if __name__ == "__main__":
    cli.run(main)

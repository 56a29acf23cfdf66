"""One decoding step of OPT on this machine's CPU: the native session against transformers.

    python -m bench.cpu                     # OPT-2.7B's shapes, random weights: 13 GB, some minutes
    python -m bench.cpu --layers 8          # a quarter of the layers, for a quarter of both

Prints milliseconds a step, the bandwidth at which that reads the weights, its share of what a plain
sum over memory reaches in the same run, and the ratio to transformers in float32.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from blip2 import cli
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights
from blip2.language.native.linear import FloatLinear
from blip2.language.native.model import OPTModel
from blip2.language.native.nbits import NBitsLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

WIDTH, HEADS, VOCABULARY, POSITIONS = 2560, 32, 50272, 2048
CONTEXT = 40  # tokens before the step


def main() -> None:
    parser = cli.ArgumentParser("Time decoding steps of OPT on a CPU.")
    parser.add_argument("--layers", type=cli.positive_int, default=32, help="of OPT-2.7B's 32")
    parser.add_argument("--repeats", type=cli.positive_int, default=5, help="to take the median of")
    parser.add_argument("--rows", type=cli.positive_int, nargs="+", default=[1, 5, 8, 40])
    args = parser.parse_args()
    limit = memory_bandwidth()
    print(f"{torch.get_num_threads()} threads, {limit / 1e9:.1f} GB/s; {args.layers} layers")
    reference: dict[int, float] = {}
    for name, make in {
        "transformers float32": lambda: transformers_step(args.layers, torch.float32),
        "transformers bfloat16": lambda: transformers_step(args.layers, torch.bfloat16),
        "native float32": lambda: native_step(args.layers, None),
        "native INT8": lambda: native_step(args.layers, 8),
        "native INT4": lambda: native_step(args.layers, 4),
    }.items():
        step, weight_bytes = make()
        for rows in args.rows:
            seconds = median_seconds(step(rows), args.repeats)
            reference.setdefault(rows, seconds)
            rate = weight_bytes / seconds
            print(
                f"{name:<22} rows {rows:>2} {seconds * 1e3:>8.1f} ms {rate / 1e9:>6.1f} GB/s"
                f" {rate / limit:>5.0%} {reference[rows] / seconds:>6.2f}x",
                flush=True,
            )
        del step
        gc.collect()


def memory_bandwidth() -> float:
    """Bytes a second that a sum over 2 GiB reads."""
    memory = torch.ones(1 << 29)
    return memory.numel() * 4 / median_seconds(lambda: memory.sum(), 5)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`, after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def transformers_step(layers: int, dtype: torch.dtype):
    """rows → a function that appends one token to so many rows of OPTForCausalLM; weight bytes."""
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
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)

    def start(rows: int) -> Callable[[], object]:
        prompt = torch.randint(VOCABULARY, (rows, CONTEXT))
        token = prompt[:, :1]
        with torch.inference_mode():
            cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

        @torch.inference_mode()
        def step() -> object:
            output = model(token, past_key_values=cache, use_cache=True)
            cache.crop(-1)
            return output

        return step

    return start, sum(p.numel() for p in model.parameters()) * dtype.itemsize


def native_step(layers: int, bits: int | None):
    """The same of the native model."""
    config = OPTCheckpointConfig(
        dtype="float16",
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
    )
    linear = FloatLinear if bits is None else NBitsLinear

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, 0.02)

    def packed(channels: int, inputs: int):
        return linear.pack(draw(channels, inputs), draw(channels), bits)

    def norm() -> Norm:
        return Norm(1 + draw(WIDTH), draw(WIDTH))

    embedding = draw(VOCABULARY, WIDTH)
    weights = OPTWeights(
        embedding=embedding,
        positions=draw(POSITIONS, WIDTH),
        layers=tuple(
            Layer(
                input_norm=norm(),
                qkv=packed(3 * WIDTH, WIDTH),
                dense=packed(WIDTH, WIDTH),
                post_norm=norm(),
                fc=packed(4 * WIDTH, WIDTH),
                proj=packed(WIDTH, 4 * WIDTH),
            )
            for _ in range(layers)
        ),
        final_norm=norm(),
        head=FloatLinear(embedding, None),
    )
    model = OPTModel(config, weights)

    def start(rows: int) -> Callable[[], object]:
        lengths = torch.full((rows,), CONTEXT)
        cache = model.new_cache(lengths, 1, 64)
        prompt = torch.randint(VOCABULARY, (rows, CONTEXT))
        with torch.inference_mode():
            model.prefill(prompt, lengths, torch.zeros(rows, 0, WIDTH), cache)

        @torch.inference_mode()
        def step() -> object:
            return model.step(prompt[:, 0], cache)

        return step

    return start, layers * 12 * WIDTH**2 * (bits or 32) // 8 + embedding.nbytes


if __name__ == "__main__":
    cli.run(main)

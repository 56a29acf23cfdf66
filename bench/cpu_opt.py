"""Decoding steps of OPT-2.7B on a CPU: of transformers, and of the native session's model."""

from __future__ import annotations

import torch

from bench.cpu_limits import Run
from bench.cpu_work import Work, fill, filled
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights
from blip2.language.native.linear import Linear
from blip2.language.native.model import OPTModel, packing
from blip2.language.trtllm_format import OPTCheckpointConfig

WIDTH, HEADS, VOCABULARY, POSITIONS = 2560, 32, 50272, 2048
CONTEXT = 40  # tokens before the step
NATIVE = {  # name: the checkpoint's type, bits of the layers, bits of the head
    "native float32": (torch.float32, None, None),
    "native float16": (torch.float16, None, None),
    "native INT8": (torch.float16, 8, 8),
    "native INT4": (torch.float16, 4, 8),
}


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

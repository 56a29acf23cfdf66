"""The GPU's decoding step, run on a CPU by Triton's interpreter, against the float32 model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from blip2.language.native import fused_step
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights
from blip2.language.native.cuda import CudaModel
from blip2.language.native.layers import SOURCE
from blip2.language.native.linear import FloatLinear, dequantize, quantize
from blip2.language.native.model import OPTModel
from blip2.language.native.packing import SOURCE as UNPACK_SOURCE
from blip2.language.native.packing import PackedLinear
from blip2.language.trtllm_format import OPTCheckpointConfig

CONFIG = OPTCheckpointConfig(
    dtype="float16",
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_size=192,  # head size 48: no power of two, as OPT-2.7B's 80
    vocab_size=90,
    max_position_embeddings=64,
)


def random_models(bits: int | None, seed: int = 0) -> tuple[OPTModel, CudaModel]:
    """The same float16 values behind the reference's float32 linears and the packed ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    def linears(channels: int, inputs: int, bits: int | None, bias: bool = True):
        weight, bias = draw(channels, inputs), draw(channels) if bias else None
        return FloatLinear.pack(weight, bias, bits), PackedLinear.pack(weight, bias, bits)

    def norms() -> tuple[Norm, Norm]:
        weight, bias = 1 + draw(CONFIG.hidden_size), draw(CONFIG.hidden_size)
        return Norm(weight.float(), bias.float()), Norm(weight, bias)

    width, ffn = CONFIG.hidden_size, CONFIG.ffn_size
    shapes = {"qkv": (3 * width, width), "dense": (width, width)}
    shapes |= {"fc": (ffn, width), "proj": (width, ffn)}
    layers: tuple[list[Layer], list[Layer]] = ([], [])
    for _ in range(CONFIG.num_hidden_layers):
        parts = {name: linears(*shape, bits) for name, shape in shapes.items()}
        parts |= {"input_norm": norms(), "post_norm": norms()}
        for side, kept in enumerate(layers):
            kept.append(Layer(**{name: pair[side] for name, pair in parts.items()}))
    embedding, positions = draw(CONFIG.vocab_size, width, scale=1), draw(64, width, scale=1)
    final_norm, head = norms(), linears(CONFIG.vocab_size, width, None, bias=False)
    reference, packed = (
        OPTWeights(
            embedding=embedding.float() if side == 0 else embedding,
            positions=positions.float() if side == 0 else positions,
            layers=tuple(layers[side]),
            final_norm=final_norm[side],
            head=head[side],
        )
        for side in (0, 1)
    )
    return OPTModel(CONFIG, reference), CudaModel(CONFIG, packed)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("requests, num_beams", [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_steps_equal_the_reference(bits, requests, num_beams):
    reference, packed = random_models(bits, seed=requests)
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([3, 7, 5][:requests])
    input_ids = torch.randint(0, CONFIG.vocab_size, (requests, 7), generator=generator)
    table = torch.zeros(requests, 0, CONFIG.hidden_size)
    caches = [model.new_cache(lengths, num_beams, 8) for model in (reference, packed)]
    expected, got = (
        model.prefill(input_ids, lengths, table, cache)
        for model, cache in zip((reference, packed), caches, strict=True)
    )
    assert (got - expected).norm() / expected.norm() < 3e-3
    rows = requests * num_beams
    first_rows = torch.arange(rows) // num_beams * num_beams
    for _ in range(3):
        tokens = torch.randint(0, CONFIG.vocab_size, (rows,), generator=generator)
        expected = reference.step(tokens, caches[0])
        got = packed.step(tokens, caches[1])
        assert (got - expected).norm() / expected.norm() < 3e-3
        beams = torch.randint(0, num_beams, (rows,), generator=generator)
        for cache in caches:
            cache.reorder(first_rows + beams)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_lie_where_the_kernel_reads_them(bits):
    """linear.cu's indexing, written out: lane 4 g + t, channels g and g + 8, inputs 8t .. 8t + 7."""
    channels, inputs = 40, 128  # the last block of 16 channels is not full
    weight = torch.randn(channels, inputs).half()
    packed = PackedLinear.pack(weight, None, bits)
    values, scales = quantize(weight, bits)
    stored = packed.weight.numpy().reshape(-1)
    group_size = 64 if bits == 4 else 32
    for channel in range(channels):
        for k in range(inputs):
            tile, in_tile = divmod(channel, 16)
            far, g = divmod(in_tile, 8)
            group, in_group = divmod(k, group_size)
            half, in_half = divmod(in_group, 32)
            t, offset = divmod(in_half, 8)
            thread = (tile * (inputs // group_size) + group) * 512 + (4 * g + t) * 16
            if bits == 8:
                value = int(stored[thread + 8 * far + offset]) - 128
            else:
                word = int(stored[thread + 4 * (2 * half + far) :][:4].view("<u4")[0])
                nibble = offset // 2 + 4 * (offset % 2)
                value = (word >> 4 * nibble & 15) - 8
            assert value == values[channel, k]
    expected = dequantize(values, scales.half())
    assert (packed.unpacked().float() - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 3])
def test_image_features_stand_where_their_ids_do(rows):
    """Prompts padded to a multiple of what is prepared, with rows of a prompt table among them."""
    reference, packed = random_models(None, seed=rows)
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(5, 20, (rows,), generator=generator)
    lengths[-1] = 19
    input_ids = torch.randint(0, CONFIG.vocab_size, (rows, 19), generator=generator)
    input_ids[:, :4] = CONFIG.vocab_size + torch.tensor([2, 0, 1, 2])
    table = torch.randn(rows, 3, CONFIG.hidden_size, generator=generator)
    expected, got = (
        model.prefill(input_ids, lengths, table, model.new_cache(lengths, 1, 2))
        for model in (reference, packed)
    )
    assert (got - expected).norm() / expected.norm() < 3e-3


def opt_2_7b() -> OPTCheckpointConfig:
    return OPTCheckpointConfig(
        dtype="float16",
        num_hidden_layers=32,
        num_attention_heads=32,
        hidden_size=2560,
        vocab_size=50272,
        max_position_embeddings=2048,
    )


# Architecture, multiprocessors, and shared memory that a block can ask for.
GPUS = {"H100": ("sm_90", 132, 227 << 10), "RTX 5090": ("sm_120", 170, 99 << 10)}


@pytest.mark.parametrize("gpu, bits", [("H100", (16, 16)), ("H100", (8, 8)), ("RTX 5090", (4, 8))])
def test_the_fused_step_compiles(gpu, bits):
    compiled = pytest.importorskip("blip2.language.native.compiled")
    architecture, multiprocessors, shared = GPUS[gpu]
    macros = fused_step.shape_macros(opt_2_7b(), 1, bits, multiprocessors, shared)
    assert compiled.compile_source(fused_step.SOURCE, tuple(macros.items()), architecture)


def test_the_fused_step_knows_what_it_cannot_take():
    small = dataclasses.replace(opt_2_7b(), hidden_size=192, num_attention_heads=4)
    assert fused_step.shape_macros(small, 1, (16, 16), 132, 227 << 10) is None
    odd = dataclasses.replace(opt_2_7b(), vocab_size=50271)
    assert fused_step.shape_macros(odd, 1, (16, 16), 132, 227 << 10) is None
    assert fused_step.shape_macros(odd, 1, (8, 8), 132, 227 << 10) is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_the_unpacking_kernel_compiles(bits):
    compiled = pytest.importorskip("blip2.language.native.compiled")
    assert compiled.compile_source(UNPACK_SOURCE, (("BITS", bits),), "sm_80")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_large_kernel_compiles(architecture, bits):
    """Every way it is used in OPT-2.7B; it runs only on a GPU."""
    compiled = pytest.importorskip("blip2.language.native.compiled")
    for tiles, inputs in ((1, 2560), (1, 10240), (2, 2560), (8, 10240)):
        macros = {"BITS": bits, "TILES": tiles, "WARPS": 8, "WIDTH": inputs, "RELU": 0}
        macros |= {"RESIDUAL": 1, "OUT_FLOAT": 1, "HAS_BIAS": 1}
        assert compiled.compile_source(SOURCE, tuple(macros.items()), architecture)
    with pytest.raises(RuntimeError, match=r"linear\.cu with .*error"):
        compiled.compile_source(SOURCE, (("BITS", bits),), architecture)

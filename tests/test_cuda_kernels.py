"""What runs OPT on a GPU, on a CPU: Triton's kernels interpreted, doubles of the others.

Against the float32 model. That the kernels in CUDA C++ are right, tests/gpu says.
"""

from __future__ import annotations

import dataclasses
import gc
import types
import weakref

import gpu_double
import pytest
import torch
from conftest import compiled_launches
from torch.nn import functional

pytest.importorskip("triton")

from blip2.float8 import quantise
from blip2.language.decoding import BeamSearch, Greedy
from blip2.language.native import cuda_decoding, fused_step, layers, prompt, span
from blip2.language.native.cache import KVCache
from blip2.language.native.checkpoint import Layer, Norm, OPTWeights
from blip2.language.native.cuda import CudaModel
from blip2.language.native.cuda_cache import CudaCache
from blip2.language.native.cuda_decoding import CudaBeamSearch, CudaGreedy
from blip2.language.native.float8_layers import Float8Layers
from blip2.language.native.layered_step import ATTENTION_SOURCE
from blip2.language.native.layers import SOURCE
from blip2.language.native.linear import FloatLinear, dequantize, quantize
from blip2.language.native.model import OPTModel
from blip2.language.native.packing import SOURCE as UNPACK_SOURCE
from blip2.language.native.packing import PackedLinear
from blip2.language.session import GenerationOptions
from blip2.language.trtllm_format import OPTCheckpointConfig

pytestmark = pytest.mark.usefixtures("gpu_double")

CONFIG = OPTCheckpointConfig(
    dtype="float16",
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_size=192,  # head size 48: no power of two, as OPT-2.7B's 80
    vocab_size=90,
    max_position_embeddings=64,
)


def random_models(
    bits: int | str | None, seed: int = 0, config: OPTCheckpointConfig = CONFIG
) -> tuple[OPTModel, CudaModel]:
    """The same float16 values behind the reference's float32 linears and the packed ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    def linears(channels: int, inputs: int, bits: int | str | None, bias: bool = True):
        weight, bias = draw(channels, inputs), draw(channels) if bias else None
        if bits == "float8":
            values, scales = quantise(weight)
            exact = FloatLinear.pack(values.float() * scales, bias, None)
            return exact, PackedLinear.of_float8(values, scales[:, 0], bias)
        return FloatLinear.pack(weight, bias, bits), PackedLinear.pack(weight, bias, bits)

    def norms() -> tuple[Norm, Norm]:
        weight, bias = 1 + draw(config.hidden_size), draw(config.hidden_size)
        return Norm(weight.float(), bias.float()), Norm(weight, bias)

    width, ffn = config.hidden_size, config.ffn_size
    shapes = {"qkv": (3 * width, width), "dense": (width, width)}
    shapes |= {"fc": (ffn, width), "proj": (width, ffn)}
    layers: tuple[list[Layer], list[Layer]] = ([], [])
    for _ in range(config.num_hidden_layers):
        parts = {name: linears(*shape, bits) for name, shape in shapes.items()}
        parts |= {"input_norm": norms(), "post_norm": norms()}
        for side, kept in enumerate(layers):
            kept.append(Layer(**{name: pair[side] for name, pair in parts.items()}))
    embedding, positions = draw(config.vocab_size, width, scale=1), draw(64, width, scale=1)
    final_norm, head = norms(), linears(config.vocab_size, width, None, bias=False)
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
    return OPTModel(config, reference), CudaModel(config, packed)


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


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_lies_between_attentions_is_one_kernel(bits, monkeypatch):
    """Of a prompt of 40 tokens, and of steps of 33 rows."""
    launched = gpu_double.count_launches(monkeypatch)
    config = dataclasses.replace(CONFIG, hidden_size=128)
    models = random_models(bits, config=config)
    tokens = torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(7))
    table = torch.zeros(1, 0, config.hidden_size)
    for length, num_beams, steps in ((40, 1, 0), (5, 33, 2)):
        lengths = torch.tensor([length])
        caches = [model.new_cache(lengths, num_beams, 8) for model in models]
        expected, got = (
            model.prefill(tokens[None, :length], lengths, table, cache)
            for model, cache in zip(models, caches, strict=True)
        )
        assert relative_error(got, expected) < 3e-3
        for _ in range(steps):
            expected, got = (
                model.step(tokens[:num_beams], cache)
                for model, cache in zip(models, caches, strict=True)
            )
            assert relative_error(got, expected) < 3e-3
    assert launched["span.cu"] == 1 + 2  # of two layers one


def test_a_model_goes_with_its_last_reference():
    """And with it its caches and graphs, which may be gigabytes: nobody waits for the collector."""
    _, model = random_models(None)
    lengths = torch.tensor([5])
    table = torch.zeros(1, 0, CONFIG.hidden_size)
    cache = model.new_cache(lengths, 1, 8)
    for _ in range(3):  # as it is, captured, replayed
        model.prefill(torch.zeros(1, 5, dtype=torch.int64), lengths, table, cache)
        model.step(torch.zeros(1, dtype=torch.int64), cache)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, cache
        assert gone() is None
    finally:
        gc.enable()


def rounded(x: torch.Tensor) -> torch.Tensor:
    values, scales = quantise(x)
    return values.float() * scales


@pytest.mark.parametrize("rows", [9, 200])
def test_a_layer_in_float8_rounds_the_inputs_of_each_linear(rows, monkeypatch):
    """Each linear alone, on what was computed before it: by Hopper's kernel, and by cuBLAS.

    With these numbers nothing lies so near to half way between two of E4M3 that it may go either way.
    """
    monkeypatch.setattr("blip2.gpu.float8.product_dtype", lambda _device: torch.float32)
    reference, packed = random_models("float8")
    truth, layer, width = reference.weights.layers[0], packed.weights.layers[0], CONFIG.hidden_size
    layers = Float8Layers(CONFIG, packed.weights, rows, torch.device("cpu"))
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    layers.x.copy_(x)
    found = {}

    def attention(_index: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        found["qkv"] = qkv.float()
        attended.copy_(qkv[:, :width])

    def norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return functional.layer_norm(x, (width,), norm.weight, norm.bias, 1e-5)

    layers._attend(0, attention)
    assert relative_error(found["qkv"], truth.qkv(rounded(norm(x, truth.input_norm)))) < 1e-3
    attended = layers._attended.float()
    layers._add(layers._attended, layer.dense)
    stream = layers._residual.summed().clone()
    assert relative_error(stream - x, truth.dense(rounded(attended))) < 1e-3
    hidden = layers._multiply(layers._norms[0][1](layers._residual), layer.fc, layers._hidden)
    assert relative_error(hidden.float(), truth.fc(rounded(norm(stream, truth.post_norm)))) < 1e-3
    layers._add(hidden, layer.proj, "relu")
    end = layers._residual.summed().clone()
    assert relative_error(end - stream, truth.proj(rounded(hidden.float().relu()))) < 1e-3
    logits = torch.empty(rows, CONFIG.vocab_size)
    layers.logits(logits)
    exact = reference.weights.head(norm(end, reference.weights.final_norm))
    assert relative_error(logits, exact) < 1e-3


@pytest.mark.parametrize("rows", [1, 9])
def test_steps_of_more_than_eight_rows_are_in_float8(rows, monkeypatch):
    """Fewer have their inputs in 16 bits, behind prompts that were rounded."""
    monkeypatch.setattr("blip2.gpu.float8.product_dtype", lambda _device: torch.float32)
    reference, packed = random_models("float8", seed=rows)
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(3, 8, (rows,), generator=generator)
    input_ids = torch.randint(0, CONFIG.vocab_size, (rows, 7), generator=generator)
    caches = [model.new_cache(lengths, 1, 8) for model in (reference, packed)]
    expected, got = (
        model.prefill(input_ids, lengths, torch.zeros(rows, 0, CONFIG.hidden_size), cache)
        for model, cache in zip((reference, packed), caches, strict=True)
    )
    assert 1e-2 < relative_error(got, expected) < 0.1
    share_prompts(*caches, 7)
    for tokens in torch.randint(0, CONFIG.vocab_size, (3, rows), generator=generator):
        error = relative_error(packed.step(tokens, caches[1]), reference.step(tokens, caches[0]))
        assert 1e-2 < error < 0.1 if rows > 8 else error < 3e-3


def share_prompts(cache: KVCache, other: CudaCache, length: int) -> None:
    """Give another cache, which has them but for rounding to 8 bits, the same keys and values."""
    for kind in ("keys", "values"):
        kept, found = (getattr(each, kind)[:, :, :, :length] for each in (cache, other))
        assert relative_error(found.float(), kept) < 0.1
        found.copy_(kept)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


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


@pytest.mark.parametrize("most_captured", [1024, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_image_features_stand_where_their_ids_do(rows, most_captured, monkeypatch):
    """Prompts padded to what is prepared, or as they come, with rows of a prompt table among them."""
    monkeypatch.setattr(prompt, "_CAPTURED_TOKENS", most_captured)
    assert prompt.padded_length(rows, 19) == (32 if most_captured > 8 else 24)
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


@pytest.mark.parametrize("bits", [None, 8, 4, "float8"])
def test_one_row_of_wider_models_is_one_launch(bits):
    """Which finds its weights by a table of addresses."""
    config = dataclasses.replace(CONFIG, hidden_size=512, num_attention_heads=8, vocab_size=96)
    reference, packed = random_models(bits, config=config)
    assert fused_step.macros_for(config, packed.weights, 1, torch.device("cpu")) is not None
    lengths, input_ids = torch.tensor([7]), torch.randint(0, 96, (1, 7))
    caches = [model.new_cache(lengths, 1, 8) for model in (reference, packed)]
    for model, cache in zip((reference, packed), caches, strict=True):
        model.prefill(input_ids, lengths, torch.zeros(1, 0, 512), cache)
    if bits == "float8":  # which rounds the prompt's inputs
        share_prompts(*caches, 7)
    for token in torch.randint(0, 96, (3, 1)):
        expected, got = reference.step(token, caches[0]), packed.step(token, caches[1])
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


@pytest.mark.parametrize(
    "gpu, width, bits, float8",
    [
        ("H100", 2560, (16, 16), False),
        ("H100", 2560, (8, 8), False),
        ("H100", 2560, (8, 16), True),
        ("H100", 4096, (4, 8), False),  # OPT-6.7B: blip2-opt-6.7b's
        ("RTX 5090", 2560, (4, 8), False),
        ("RTX 5090", 4096, (8, 16), True),
    ],
)
def test_the_fused_step_compiles(gpu, width, bits, float8):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    architecture, multiprocessors, shared = GPUS[gpu]
    config = dataclasses.replace(opt_2_7b(), hidden_size=width)
    macros = fused_step.shape_macros(config, bits, multiprocessors, shared, float8)
    assert compiled.compile_source(fused_step.SOURCE, tuple(macros.items()), architecture)


def test_the_fused_step_knows_what_it_cannot_take():
    small = dataclasses.replace(opt_2_7b(), hidden_size=192, num_attention_heads=4)
    assert fused_step.shape_macros(small, (16, 16), 132, 227 << 10) is None
    odd = dataclasses.replace(opt_2_7b(), vocab_size=50271)
    assert fused_step.shape_macros(odd, (16, 16), 132, 227 << 10) is None
    assert fused_step.shape_macros(odd, (8, 8), 132, 227 << 10) is not None


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"do_layer_norm_before": False}])
def test_the_fused_step_takes_no_other_opt(change):
    """Among ReLU's results no sign means anything: there the marks are."""
    assert shape_macros() is not None
    assert shape_macros(dataclasses.replace(opt_2_7b(), **change)) is None


def test_the_fused_step_needs_multiprocessors():
    """Of a part of an H100 with 16 each would have ten tiles of dense, but it sums up eight."""
    assert shape_macros(multiprocessors=16) is None
    assert shape_macros(multiprocessors=32)["BLOCKS"] == 32


def shape_macros(
    config: OPTCheckpointConfig | None = None, multiprocessors: int = 132
) -> dict[str, int] | None:
    return fused_step.shape_macros(config or opt_2_7b(), (16, 16), multiprocessors, 227 << 10)


@pytest.mark.parametrize("multiprocessors", [30, 36, 46, 84, 132, 148, 170])
@pytest.mark.parametrize("width, heads", [(512, 8), (640, 8), (2048, 32), (2560, 32), (4096, 32)])
def test_the_fused_steps_work_is_dealt_out(width, heads, multiprocessors):
    """Counted slab by slab."""
    config = dataclasses.replace(opt_2_7b(), hidden_size=width, num_attention_heads=heads)
    macros = shape_macros(config, multiprocessors)
    most_tiles = 0
    for inputs in (width, 4 * width):
        tiles, slabs = width // 16, inputs // 64 // fused_step_warps(width)
        sharers = min(tiles * slabs, multiprocessors, 3 * width // 16)
        owners: list[int] = []
        for block in range(sharers):
            end = (block + 1) * tiles * slabs // sharers
            owners += [block] * (end - len(owners))
        tiles_of: dict[int, set[int]] = {block: set() for block in range(sharers)}
        for slab, block in enumerate(owners):
            tiles_of[block].add(slab // slabs)
        most_tiles = max(most_tiles, *map(len, tiles_of.values()))
        if macros is not None:
            for tile in range(tiles):
                blocks = set(owners[tile * slabs : (tile + 1) * slabs])
                assert len(blocks) <= macros["SLOTS"]
    assert (macros is None) == (most_tiles > 8)


def fused_step_warps(width: int) -> int:
    """The most of 8 to 11 that divide the groups of 64 inputs."""
    return max(n for n in (8, 9, 10, 11) if width // 64 % n == 0)


SMALL = {"hidden_size": 640, "num_attention_heads": 8}  # 120 tiles of qkv, 160 of fc, 40 of dense


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"BLOCKS": 121}, "a block has no share of qkv"),
        ({"BLOCKS": 81, "FFN": 1280}, "a block has no share of fc"),
        ({"SLOTS": 2}, "proj: more blocks share a tile than there are slots"),
        ({"SLOTS": 1, "WIDTH": 1280}, "dense: more blocks share a tile than there are slots"),
        ({"BLOCKS": 4}, "dense: a block has more tiles than it sums up"),
        ({"BLOCKS": 4}, "proj: a block has more tiles than it sums up"),
        ({"HEADS": 7}, "heads do not share the width evenly"),
        ({"HEADS": 160}, "a warp does not read heads of this size"),
        ({"HEADS": 2}, "a warp does not read heads of this size"),
        ({"WARPS": 9}, "warps do not share the inputs evenly"),
        ({"WARPS": 2}, "a block has fewer threads than a head has numbers"),
        ({"FFN": 2624}, "warps do not share the inputs evenly"),
        ({"VOCAB": 50271}, "the last tile of a head in 16 bits is not full"),
        ({"LAYERS": 0}, "there is no layer"),
        ({"SHARED": 100_000}, "shared memory is too small"),
        ({"UNDER_WAY": 0}, "more copies are to be under way than there are stages"),
        ({"DEPTH": 2, "UNDER_WAY": 3}, "more copies are to be under way than there are stages"),
        ({"BITS": 8, "STAGE": 4}, "a stage holds no slab of the layers' weights"),
        ({"HEAD_BITS": 8, "STAGE": 4}, "a stage holds no slab of the head's weights"),
        ({"SLOTS": 33}, "a thread reads more marked words"),
    ],
)
def test_the_fused_step_does_not_compile_with_what_would_break_it(changes, what):
    """docs/step.md: what its argument rests on."""
    compiled = pytest.importorskip("blip2.gpu.compiled")
    macros = shape_macros(dataclasses.replace(opt_2_7b(), **SMALL))
    assert (macros["BLOCKS"], macros["SLOTS"]) == (120, 4)
    with pytest.raises(RuntimeError, match=what):
        compiled.compile_source(fused_step.SOURCE, tuple((macros | changes).items()), "sm_90a")


def test_blocks_that_wait_for_one_another_are_launched_together(monkeypatch):
    """And not before the kernel before has ended, which other kernels may be."""
    compiled = pytest.importorskip("blip2.gpu.compiled")
    configs, kinds = [], compiled.driver.CUlaunchAttributeID

    def launch(config, *_):
        configs.append(config)
        return (compiled.driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(compiled.driver, "cuLaunchKernelEx", launch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(compiled.CompiledKernel, "_function", None)
    kernel = compiled.CompiledKernel(fused_step.SOURCE, "step", ())
    kernel((132, 1), 32, 0, together=True, dependent=False)
    kernel((132, 1), 32, 0, together=True)
    kernel((132, 1), 32, 0)
    together, both, alone = ({attribute.id for attribute in config.attrs} for config in configs)
    assert together == {kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE}
    assert both == together | alone
    assert configs[0].attrs[0].value.cooperative == 1
    assert alone == {kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION}


@pytest.mark.parametrize("ffn, blocks", [(2560, 120), (1280, 80)])
def test_every_block_of_the_fused_step_has_a_share(ffn, blocks):
    """Of the tiles of qkv and of fc, which here are fewer than multiprocessors."""
    config = dataclasses.replace(opt_2_7b(), **SMALL, intermediate_size=ffn)
    assert shape_macros(config)["BLOCKS"] == blocks


@pytest.mark.parametrize("bits", [8, 4])
def test_the_unpacking_kernel_compiles(bits):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    assert compiled.compile_source(UNPACK_SOURCE, (("BITS", bits),), "sm_80")


_LARGE = {("sm_80", 16), ("sm_90", 8), ("sm_120", 4)}  # each once; the rest takes a while


@pytest.mark.parametrize(
    "architecture, bits",
    [
        pytest.param(name, bits, marks=() if (name, bits) in _LARGE else pytest.mark.slow)
        for name in ("sm_80", "sm_90", "sm_120")
        for bits in (16, 8, 4)
    ],
)
def test_the_large_kernel_compiles(architecture, bits):
    """Every way it is used in OPT-2.7B; it runs only on a GPU."""
    compiled = pytest.importorskip("blip2.gpu.compiled")
    for tiles, inputs in ((1, 2560), (1, 10240), (2, 2560), (8, 10240)):
        macros = {"BITS": bits, "TILES": tiles, "WARPS": 8, "WIDTH": inputs, "RELU": 0}
        macros |= {"RESIDUAL": 1, "OUT_FLOAT": 1, "HAS_BIAS": 1}
        assert compiled.compile_source(SOURCE, tuple(macros.items()), architecture)
    with pytest.raises(RuntimeError, match=r"linear\.cu with .*error"):
        compiled.compile_source(SOURCE, (("BITS", bits),), architecture)


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "sm_120"])
def test_the_large_kernel_compiles_for_float8(architecture):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    macros = {"BITS": 8, "FLOAT8": 1, "TILES": 1, "WARPS": 8, "WIDTH": 2560, "RELU": 0}
    macros |= {"RESIDUAL": 1, "OUT_FLOAT": 1, "HAS_BIAS": 1}
    assert compiled.compile_source(SOURCE, tuple(macros.items()), architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_the_steps_attention_compiles(architecture, head_size):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    macros = (("HEAD_SIZE", head_size), ("WARPS", 4))
    assert compiled.compile_source(ATTENTION_SOURCE, macros, architecture)


@pytest.mark.parametrize(
    "bits, float8, rows",
    [(16, 0, 9), (16, 0, 40), (16, 0, 64), (8, 0, 48), (4, 0, 30), (8, 1, 9), (8, 1, 64)],
)
@pytest.mark.parametrize("shape", [(7680, 2560), (2560, 10240)])
def test_hoppers_kernels_compile(shape, bits, float8, rows):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    source, macros, shared_bytes = layers.hopper_kernel(shape, bits, rows, 132, bool(float8))
    # What a block adds up lies where its steps did; two blocks have room on a multiprocessor.
    assert 8 * macros["TILES"] * (128 + 4) * 4 <= shared_bytes <= (228 << 10) // 2 - (2 << 10)
    macros |= {"WIDTH": shape[1], "RELU": 1, "RESIDUAL": 0, "OUT_FLOAT": 0, "HAS_BIAS": 1}
    assert compiled.compile_source(source, tuple(macros.items()), "sm_90a")


def span_macros(width: int, bits: int) -> dict[str, int] | None:
    config = dataclasses.replace(CONFIG, hidden_size=width)
    return span.shape_macros(config, bits, 132, 227 << 10)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("width", [768, 2560])
def test_the_span_compiles(bits, width):
    compiled = pytest.importorskip("blip2.gpu.compiled")
    macros = span_macros(width, bits)
    assert compiled.compile_source(span.SOURCE, tuple(macros.items()), "sm_90a")


def test_the_span_shares_out_every_linear():
    """OPT-2.7B's, to an H100's 132 blocks: one tile for each, all as large but qkv's."""
    macros = span_macros(2560, 4)
    tiles = {name: macros[f"{name}_TILE"] for name in ("DENSE", "FC", "PROJ", "QKV")}
    assert tiles == {"DENSE": 80, "FC": 80, "PROJ": 80, "QKV": 64}
    assert macros["SPLIT"] * 2560 / 80 == 10240 / 80 == 128
    assert 7680 / 64 == 120
    assert span_macros(4096, 4) is None  # tiles of more channels than it was timed with
    assert span_macros(192, 4) is None  # inputs that are no whole steps


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"SHARED": 200 << 10}, "shared memory is too small"),
        ({"UNDER_WAY": 9}, "more copies are to be under way"),
        ({"WIDTH": 2496}, "a linear's shape"),
        ({"FC_TILE": 72}, "a linear's shape"),
        ({"SPLIT": 5}, "registers do not suffice"),
    ],
)
def test_the_span_does_not_compile_with_what_would_break_it(changes, what):
    """docs/span.md: what its argument rests on."""
    compiled = pytest.importorskip("blip2.gpu.compiled")
    macros = span_macros(2560, 4)
    assert macros["WEIGHTS_DEPTH"] == 7
    with pytest.raises(RuntimeError, match=what):
        compiled.compile_source(span.SOURCE, tuple((macros | changes).items()), "sm_90a")


def test_greedy_search_as_one_kernel():
    """Against the one of many: ties, and rows that end."""
    generator = torch.Generator().manual_seed(0)
    options = GenerationOptions(end_id=7, pad_id=1, max_output_len=9)
    texts = [torch.tensor([3])] * 3
    one_kernel = CudaGreedy(options, texts, 9000, torch.device("cpu"))  # more than a block
    plain = Greedy(options, texts, 9000, "cpu")
    for step in range(9):
        logits = torch.randn(3, 9000, generator=generator)
        logits[:, [100, 308, 8292, 8500]] = 9.0  # the first; the third is 8192 behind it
        if step in (2, 5):
            logits[step // 3, 7] = 10.0
        assert torch.equal(one_kernel.advance(logits)[0], plain.advance(logits)[0])
        assert torch.equal(one_kernel.ended(), plain.ended())
    assert one_kernel.ended().tolist() == [True, True, False]
    got, expected = ([g.beams[0] for g in s.results()] for s in (one_kernel, plain))
    assert [beam.token_ids for beam in got] == [beam.token_ids for beam in expected]
    log_probs = [beam.log_prob for beam in expected]
    assert [beam.log_prob for beam in got] == pytest.approx(log_probs, abs=1e-5)
    assert all(-8 < log_prob < -0.3 for log_prob in log_probs)
    assert one_kernel.finite_rows().all()
    assert plain.finite_rows().all()


def assert_same_beams(
    options: GenerationOptions, requests: int, vocab_size: int, end_score: float = 0.0
) -> CudaBeamSearch:
    """Step by step, of random logits of which the end token's have end_score added."""
    texts = [torch.tensor([3])] * requests
    fast = CudaBeamSearch(options, texts, vocab_size, torch.device("cpu"))
    plain = BeamSearch(options, texts, vocab_size, "cpu")
    generator = torch.Generator().manual_seed(0)
    for step in range(options.max_output_len):
        logits = 3 * torch.randn(fast.rows, vocab_size, generator=generator)
        logits[:, options.end_id] += end_score
        got, expected = fast.advance(logits), plain.advance(logits)
        if step < options.max_output_len - 1:  # at the last all running beams tie
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
        assert torch.equal(fast.ended(), plain.ended())
    assert fast.finite_rows().all()
    assert plain.finite_rows().all()
    got, expected = (
        [beam for generation in search.results() for beam in generation.beams]
        for search in (fast, plain)
    )
    assert [beam.token_ids for beam in got] == [beam.token_ids for beam in expected]
    assert [b.score for b in got] == pytest.approx([b.score for b in expected], 1e-5, 1e-5)
    return fast


@pytest.mark.parametrize(
    "requests, num_beams, vocab_size, block, steps, length_penalty, end_score, early_stopping",
    [
        (1, 5, 300, 128, 8, 1.0, 4.0, False),  # the last of three blocks is not full
        (2, 3, 200, 128, 10, 1.0, 5.0, True),
        (2, 3, 100, 128, 10, -1.0, 4.0, True),
        (4, 2, 50, 128, 8, 0.0, 4.0, False),
        (2, 2, 100, 128, 10, 2.0, 2.0, False),
        (1, 4, 12, 4, 3, 1.0, -99.0, False),  # blocks of fewer than are kept; no beam ends early
        (1, 2, 50272, 1024, 2, 1.0, 0.0, False),
    ],
)
def test_beam_search_as_two_kernels(
    requests,
    num_beams,
    vocab_size,
    block,
    steps,
    length_penalty,
    end_score,
    early_stopping,
    monkeypatch,
):
    """Against the one of many, also after some or all requests have ended."""
    monkeypatch.setattr(cuda_decoding, "_BLOCKS", (block,))
    options = GenerationOptions(
        end_id=7,
        max_output_len=steps,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    search = assert_same_beams(options, requests, vocab_size, end_score)
    assert search._block == block


@pytest.mark.parametrize("capability", [80, 90])
def test_beam_searchs_kernels_compile(capability):
    """The interpreter sees neither types nor sizes as a GPU does."""
    names = {name for name, _ in compiled_launches("triton_compile_beams.py", capability)}
    assert names == {"candidates_kernel", "beams_kernel", "reorder_kernel"}


@pytest.mark.parametrize(
    "vocab_size, num_beams, block",
    [(50272, 5, 1024), (50272, 10, 8192), (50272, 20, None), (9, 5, None), (10, 5, 1024)],
)
def test_blocks_leave_no_more_candidates_than_fit(vocab_size, num_beams, block):
    assert cuda_decoding._block(vocab_size, 2 * num_beams) == block


@pytest.mark.parametrize("num_beams, penalty", [(3, 1.5), (60, 1.0)])
def test_a_penalty_or_many_beams_take_the_plain_beam_search(num_beams, penalty):
    options = GenerationOptions(
        end_id=7, max_output_len=4, num_beams=num_beams, repetition_penalty=penalty
    )
    assert assert_same_beams(options, 2, 150)._block is None


@pytest.mark.parametrize("num_beams, search", [(1, CudaGreedy), (2, CudaBeamSearch)])
def test_the_model_says_what_searches(num_beams, search):
    options, text = GenerationOptions(end_id=7, num_beams=num_beams), torch.tensor([3])
    model = object.__new__(CudaModel)
    model.config = types.SimpleNamespace(vocab_size=50)
    strategy = model.new_strategy(options, [text], 0, torch.device("cpu"))
    assert type(strategy) is search


@pytest.mark.parametrize("num_beams", [1, 3, 4])
def test_a_beam_takes_over_the_table_of_another(num_beams):
    """Of 300 slots, more than a block's, as far as they are filled."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, hidden_size=4)
    cache = CudaCache(config, 2 * num_beams, 300, torch.device("cpu"))
    cache.reset(torch.tensor([270, 20]), num_beams)
    rows = torch.arange(2 * num_beams)
    cache.sources.copy_(torch.randint(0, 2 * num_beams, cache.sources.shape))
    source_rows = rows // num_beams * num_beams + torch.randint(0, num_beams, rows.shape)
    answered = torch.arange(300) < cache.lengths[:, None]
    expected = torch.where(answered, cache.sources[source_rows], rows.int()[:, None])
    cache.reorder(source_rows)
    assert torch.equal(cache.sources, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("search", [CudaGreedy, Greedy, CudaBeamSearch, BeamSearch])
def test_nan_and_inf_of_an_early_step_are_remembered(search, value):
    num_beams = 2 if issubclass(search, BeamSearch) else 1
    options = GenerationOptions(end_id=7, max_output_len=3, num_beams=num_beams)
    strategy = search(options, [torch.tensor([3])] * 2, 50, torch.device("cpu"))
    logits = torch.randn(strategy.rows, 50)
    strategy.advance(logits)
    assert strategy.finite_rows().all()
    broken = logits.clone()
    broken[1, 30] = value
    strategy.advance(broken)
    strategy.advance(logits)
    assert not strategy.finite_rows().all()
    with pytest.raises(FloatingPointError):
        strategy.results()


def test_a_penalty_takes_the_plain_greedy_search():
    options = GenerationOptions(end_id=7, max_output_len=4, repetition_penalty=1.5)
    texts = [torch.tensor([3, 5])] * 2
    searches = [search(options, texts, 50, torch.device("cpu")) for search in (CudaGreedy, Greedy)]
    logits = torch.randn(4, 2, 50)
    for step in logits:
        assert len({tuple(search.advance(step)[0].tolist()) for search in searches}) == 1
    assert searches[0].results() == searches[1].results()


@pytest.mark.parametrize(
    "channels, inputs, rows, split",
    [
        (7680, 2560, 64, 4),  # OPT-2.7B's qkv: 60 blocks, of which an H100 has room for 264
        (2560, 2560, 64, 8),
        (10240, 2560, 64, 2),
        (50272, 2560, 64, 2),  # three waves, the last one full but for six
        (2560, 128, 64, 2),  # no more than there are steps of inputs
    ],
)
def test_hoppers_blocks_fill_the_gpu(channels, inputs, rows, split):
    _, macros, _ = layers.hopper_kernel((channels, inputs), 16, rows, 132)
    assert macros["SPLIT"] == split

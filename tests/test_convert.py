"""Converted checkpoints hold the tensors the format calls for, and appear whole or not at all."""

import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap

import opt_models
import pytest
import torch
from conftest import run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from transformers import OPTConfig, OPTForCausalLM

from blip2.artifacts.safetensors_writer import SafetensorsWriter
from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error
from blip2.language import conversion
from blip2.language.trtllm_format import OPTCheckpointConfig, Spec, tensor_specs
from blip2.programs.convert_checkpoint import default_output_dir

SCRIPT = "opt/convert_checkpoint.py"
HIDDEN, FFN, VOCAB, POSITIONS, LAYERS = 64, 256, 97, 60, 2
SHAPE = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS}


def convert(model, directory, workers=1, **options):
    """Convert in this process; return each rank's tensors."""
    if not (directory / "hf").exists():
        model.save_pretrained(directory / "hf")
    checkpoint = open_checkpoint(directory / "hf")
    options = conversion.ConversionOptions(**options)
    config = conversion.target_config(checkpoint, options)
    conversion.convert(checkpoint, config, directory / "opt", workers)
    ranks = [load_file(directory / "opt" / f"rank{r}.safetensors") for r in range(options.tp_size)]
    for tensors in ranks:
        shapes = {name: spec.shape for name, spec in tensor_specs(config).items()}
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    return ranks


def expected_tensors(state, prefix="model.decoder."):
    """The format's table, written out from a transformers state dict of a pre-LN OPT."""
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    tensors = {
        "transformer.vocab_embedding.weight": state["embed_tokens.weight"],
        "transformer.position_embedding.weight": state["embed_positions.weight"][2:],
        "lm_head.weight": state["embed_tokens.weight"],
    }
    for kind in ("weight", "bias"):
        for i in range(LAYERS):
            old, new = f"layers.{i}.", f"transformer.layers.{i}."
            qkv = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{new}attention.qkv.{kind}"] = torch.cat(qkv)
            tensors[f"{new}attention.dense.{kind}"] = state[f"{old}self_attn.out_proj.{kind}"]
            tensors[f"{new}mlp.fc.{kind}"] = state[f"{old}fc1.{kind}"]
            tensors[f"{new}mlp.proj.{kind}"] = state[f"{old}fc2.{kind}"]
            norms = ("self_attn_layer_norm", "final_layer_norm")
            for name, source in zip(("input_layernorm", "post_layernorm"), norms, strict=True):
                tensors[f"{new}{name}.{kind}"] = state[f"{old}{source}.{kind}"]
        if f"final_layer_norm.{kind}" in state:
            tensors[f"transformer.ln_f.{kind}"] = state[f"final_layer_norm.{kind}"]
    return tensors


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    "flags, algorithm",
    [
        ([], None),
        (["--use_weight_only"], "W8A16"),
        (["--weight_only_precision", "int4"], "W4A16"),
        (["--use_weight_only", "--weight_only_precision", "int4"], "W4A16"),
    ],
)
def test_a_precision_of_the_weights_asks_for_it(tmp_path, flags, algorithm):
    opt_models.opt(**SHAPE).save_pretrained(tmp_path / "hf")
    done = run_program(
        *(SCRIPT, "--model_dir", tmp_path / "hf", "--output_dir", tmp_path / "opt"), *flags
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "opt" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == algorithm


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_opt_alone(tmp_path, dtype):
    model = opt_models.opt(**SHAPE)
    [tensors] = convert(model, tmp_path, dtype=dtype)
    kind = getattr(torch, dtype)
    expected = expected_tensors(model.state_dict())
    assert_equal(tensors, {name: tensor.to(kind) for name, tensor in expected.items()})
    assert tensors["transformer.position_embedding.weight"].shape == (POSITIONS, HIDDEN)


def test_opt_inside_blip2(tmp_path):
    model = opt_models.blip2(**SHAPE)
    [tensors] = convert(model, tmp_path, dtype="float32")
    prefix = "language_model.model.decoder."
    assert_equal(tensors, expected_tensors(model.state_dict(), prefix))


@pytest.mark.parametrize("with_head", [True, False])
def test_files_of_2022(tmp_path, with_head):
    """Their names start at `decoder.`; facebook/opt's hold a tied lm_head, or do not."""
    model = opt_models.opt(**SHAPE)
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    if not with_head:
        del state["lm_head.weight"]
    (tmp_path / "hf").mkdir()
    model.config.save_pretrained(tmp_path / "hf")
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    [tensors] = convert(model, tmp_path, dtype="float32")
    assert_equal(tensors, expected_tensors(model.state_dict()))


@pytest.mark.parametrize("make", [opt_models.opt, opt_models.blip2], ids=["OPT", "BLIP-2"])
@pytest.mark.parametrize("stored", ["the same head", "another head", "no head", "no embedding"])
def test_tied_heads_are_what_transformers_loads(tmp_path, make, stored):
    """A stored head counts though config.json ties it, and either name will do for both."""
    model = make(**SHAPE)
    outside = "language_model." if make is opt_models.blip2 else ""
    embedding, head = f"{outside}model.decoder.embed_tokens.weight", f"{outside}lm_head.weight"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if stored == "another head":
        state[head][-1] += 1
    elif stored == "no head":
        del state[head]
    elif stored == "no embedding":
        del state[embedding]
    (tmp_path / "hf").mkdir()
    model.config.save_pretrained(tmp_path / "hf")
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "hf").state_dict()
    assert torch.equal(loaded[head], loaded[embedding]) == (stored != "another head")
    [tensors] = convert(model, tmp_path, dtype="float32")
    assert torch.equal(tensors["lm_head.weight"], loaded[head])
    assert torch.equal(tensors["transformer.vocab_embedding.weight"], loaded[embedding])


def test_what_safetensors_save_model_leaves_out(tmp_path):
    """It stores one of the tensors that share memory, under whichever name comes first."""
    model = opt_models.blip2(**SHAPE)
    (tmp_path / "hf").mkdir()
    model.config.save_pretrained(tmp_path / "hf")
    save_model(model, tmp_path / "hf" / "model.safetensors")
    [tensors] = convert(model, tmp_path, dtype="float32")
    assert_equal(tensors, expected_tensors(model.state_dict(), "language_model.model.decoder."))


def test_an_untied_head_that_is_missing_is_refused(tmp_path):
    """transformers would make one of random numbers."""
    opt_models.opt(**SHAPE).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": False})
    )
    with pytest.raises(Blip2Error, match=r"has no tensor lm_head\.weight"):
        convert(None, tmp_path, dtype="float32")


def test_untied_head(tmp_path):
    model = opt_models.opt(**SHAPE, tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)
    [tensors] = convert(model, tmp_path, dtype="float32")
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(
        tensors["transformer.vocab_embedding.weight"], model.model.decoder.embed_tokens.weight
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_projections_of_350m_are_folded_before_rounding(tmp_path, dtype):
    model = opt_models.opt(**SHAPE, **opt_models.POST_LN)
    half = model.half()  # what facebook/opt-350m stores
    [tensors] = convert(half, tmp_path, dtype=dtype)
    decoder = half.model.decoder
    embed, into, out = (
        module.weight.detach().double()
        for module in (decoder.embed_tokens, decoder.project_in, decoder.project_out)
    )
    kind = getattr(torch, dtype)
    exact = {"transformer.vocab_embedding.weight": embed @ into.T, "lm_head.weight": embed @ out}
    for name, value in exact.items():
        assert tensors[name].shape == (VOCAB, HIDDEN)
        error = (tensors[name].double() - value).abs().max()
        rounding = (value.to(kind).double() - value).abs().max()
        # Folding in float16 itself would err several times as much.
        assert error <= rounding * 1.01 + 1e-6
    assert not any(name.startswith("transformer.ln_f") for name in tensors)
    expected = expected_tensors(half.state_dict())
    for name in expected.keys() - exact.keys():
        assert torch.equal(tensors[name], expected[name].to(kind)), name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("embedding", [None, 0, 1])
def test_ranks_reassemble_to_the_whole(tmp_path, ranks, embedding):
    model = opt_models.opt(**SHAPE)
    parts = convert(
        model,
        tmp_path,
        workers=3,
        dtype="float32",
        tp_size=ranks,
        use_parallel_embedding=embedding is not None,
        embedding_sharding_dim=embedding or 0,
    )
    whole = {}
    for name in parts[0]:
        shares = [part[name] for part in parts]
        if ".qkv." in name:
            by_rank = [share.view(3, HIDDEN // ranks, *share.shape[1:]) for share in shares]
            whole[name] = torch.cat(by_rank, dim=1).flatten(0, 1)
        elif name.endswith(("attention.dense.weight", "mlp.proj.weight")):
            whole[name] = torch.cat(shares, dim=1)
        elif ".mlp.fc." in name or name == "lm_head.weight":
            whole[name] = torch.cat(shares)
        elif "_embedding" in name and embedding is not None:
            whole[name] = torch.cat(shares, dim=embedding)
        else:
            assert all(torch.equal(share, shares[0]) for share in shares)
            whole[name] = shares[0]
    padded = -(-VOCAB // ranks) * ranks
    for name in ("lm_head.weight", *["transformer.vocab_embedding.weight"] * (embedding == 0)):
        assert whole[name].shape == (padded, HIDDEN)
        assert not whole[name][VOCAB:].any()
        whole[name] = whole[name][:VOCAB]
    assert_equal(whole, expected_tensors(model.state_dict()))


@pytest.mark.parametrize("total, ranks", [(5, 4), (1, 4), (8, 4)])
def test_cut_pads_what_does_not_divide(total, ranks):
    spec = Spec((-(-total // ranks), 3), 0)
    whole = torch.arange(1.0, total + 1)[:, None].expand(total, 3)
    shares = [conversion.cut(whole, spec, rank, ranks) for rank in range(ranks)]
    assert len({share.shape for share in shares}) == 1
    joined = torch.cat(shares)
    assert torch.equal(joined[:total], whole)
    assert not joined[total:].any()


def test_config_is_the_formats(tmp_path):
    convert(
        opt_models.opt(**SHAPE),
        tmp_path,
        tp_size=2,
        use_parallel_embedding=True,
        embedding_sharding_dim=1,
    )
    assert json.loads((tmp_path / "opt" / "config.json").read_text()) == {
        "architecture": "OPTForCausalLM",
        "dtype": "float16",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": POSITIONS,
        "hidden_act": "relu",
        "quantization": {"quant_algo": None},
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 1,
        "share_embedding_table": False,
        "do_layer_norm_before": True,
    }


def test_weight_only_keeps_the_tensors_and_names_the_algorithm(tmp_path):
    model = opt_models.opt(**SHAPE)
    [tensors] = convert(model, tmp_path, quant_algo="W4A16")
    expected = expected_tensors(model.state_dict())
    assert_equal(tensors, {name: tensor.half() for name, tensor in expected.items()})
    config = json.loads((tmp_path / "opt" / "config.json").read_text())
    assert config["quantization"] == {"quant_algo": "W4A16"}
    assert config["dtype"] == "float16"


def test_sidecar_says_where_it_is_from(tmp_path):
    from blip2 import artifacts

    convert(opt_models.blip2(**SHAPE), tmp_path, quant_algo="W8A16")
    facts = artifacts.read_sidecar(tmp_path / "opt" / "rank0.safetensors", "test")
    assert facts["source"]["fingerprint"] == open_checkpoint(tmp_path / "hf").fingerprint
    assert facts["source"]["kind"] == "blip-2"
    assert (facts["dtype"], facts["quant_algo"]) == ("float16", "W8A16")
    assert facts["sha256"] == artifacts.sha256(tmp_path / "opt" / "rank0.safetensors")


def test_writer_writes_what_the_library_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "halves": torch.randn(5, 3).half(),
        "vector": torch.randn(7),
        "transposed": torch.randn(4, 6).bfloat16().T,
        "naïve": torch.randn(1, 1),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name in reversed(layout):
            writer.write(name, tensors[name].split(2))
    assert_equal(load_file(path), tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_size % 8 == 0


def test_writer_converts_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("blip2.artifacts.safetensors_writer._BLOCK", 7)
    tensor = torch.randn(11, 5)
    with SafetensorsWriter(tmp_path / "x", {"a": (torch.float16, (22, 5))}) as writer:
        writer.write("a", [tensor, tensor * 2])
    written = load_file(tmp_path / "x")["a"]
    assert torch.equal(written, torch.cat((tensor, tensor * 2)).half())


@pytest.mark.parametrize(
    "parts, message",
    [
        ([torch.ones(3)], "8 bytes, 6 were written"),
        ([torch.ones(3), torch.ones(2)], "more bytes"),
        ([torch.tensor([1, 2, 3, torch.nan])], "NaN"),
        ([torch.tensor([1, 2, 3, 1e5])], "too large"),
        (None, "never written"),
    ],
)
def test_writer_refuses_what_does_not_fit(tmp_path, parts, message):
    def write():
        with SafetensorsWriter(tmp_path / "x", {"a": (torch.float16, (4,))}) as writer:
            if parts is not None:
                writer.write("a", parts)

    with pytest.raises(ValueError, match=message):
        write()


MEASURE = """
    import sys
    from pathlib import Path
    import torch
    from blip2.checkpoints import open_checkpoint
    from blip2.language import conversion

    def status(field):
        [line] = [l for l in open("/proc/self/status") if l.startswith(field)]
        return int(line.split()[1]) / 1024

    source, target = sys.argv[1:]
    warm = open_checkpoint(source)
    warm.fingerprint
    config = conversion.target_config(warm, conversion.ConversionOptions())
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = status("VmRSS:")
    conversion.convert(warm, config, Path(target))
    print(status("VmHWM:") - before)
"""


@pytest.mark.parametrize("kind", ["many layers", "one huge tensor"])
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_is_that_of_the_largest_tensor(tmp_path, kind):
    if kind == "many layers":
        shape = {"hidden_size": 512, "word_embed_proj_dim": 512, "num_hidden_layers": 16}
        shape |= {"ffn_dim": 2048, "vocab_size": 1000, "init_std": 0.02}
        largest = 4
    else:
        shape = {"hidden_size": 512, "word_embed_proj_dim": 512, "vocab_size": 40_000}
        largest = 78
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**{**opt_models.SHAPE, **shape}))
    model.config.save_pretrained(tmp_path / "hf")
    state = {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, tmp_path / "hf" / "model.safetensors")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size / 2**20
    program = [sys.executable, "-c", textwrap.dedent(MEASURE)]
    done = subprocess.run(
        [*program, str(tmp_path / "hf"), str(tmp_path / "opt")],
        capture_output=True,
        text=True,
        cwd=opt_models.ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout)
    assert peak < largest + 32, f"{peak} MiB for {size} MiB"
    if kind == "many layers":
        assert size > 2 * (largest + 32)


def snapshot(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def test_failure_in_the_middle_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    convert(opt_models.opt(**SHAPE), tmp_path)
    before = snapshot(tmp_path / "opt")
    written = []
    write = SafetensorsWriter.write

    def failing(self, name, parts):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, parts)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(None, tmp_path, dtype="float32")
    assert len(written) == 5
    assert snapshot(tmp_path / "opt") == before


def test_command_line(tmp_path):
    opt_models.blip2(num_query_tokens=7).save_pretrained(tmp_path / "hf")
    done = opt_models.run(
        *(SCRIPT, "--model_dir", tmp_path / "hf", "--output_dir", tmp_path / "out"),
        *("--use_weight_only", "--workers", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{tmp_path / 'out'}: float16 OPT (to run as W8A16)" in done.stdout
    assert f" --opt_engine_dir {tmp_path / 'out'} " in done.stdout
    assert f"trtllm-build --checkpoint_dir {tmp_path / 'out'}" in done.stdout
    assert "--max_prompt_embedding_table_size 56\n" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W8A16"
    assert config["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            (),
            ["--max_seq_len 64", "--remove_input_padding", "prompt_embedding_table_size 256\n"],
        ),
        (("--trtllm_version", "0.9.0"), ["--max_output_len 32", "run.py cannot run that one"]),
        (("--tp_size", "2"), ["--workers 2", "mpirun -n 2 ", " --opt_engine_dir trt_eng"]),
    ],
)
def test_printed_build_command_of_a_bare_opt(tmp_path, arguments, expected):
    opt_models.opt().save_pretrained(tmp_path / "hf")
    done = opt_models.run(
        SCRIPT, "--model_dir", tmp_path / "hf", "--output_dir", tmp_path / "out", *arguments
    )
    assert done.returncode == 0, done.stderr
    assert [text for text in expected if text not in done.stdout] == []


def test_an_unknown_trtllm_version_is_refused_before_any_work(tmp_path):
    done = opt_models.run(
        *(SCRIPT, "--model_dir", tmp_path / "absent", "--output_dir", tmp_path / "out"),
        *("--trtllm_version", "1.3.0"),
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: no trtllm-build for OPT in TensorRT-LLM 1.3.0; name a release from 0.9 to 1.2.1\n"
    )
    assert not (tmp_path / "out").exists()


def test_default_output_directory_is_the_guides():
    def default(**fields):
        base = {"dtype": "float16", "num_hidden_layers": 32, "hidden_size": 2560}
        rest = {"num_attention_heads": 32, "vocab_size": 9, "max_position_embeddings": 9}
        return str(default_output_dir(OPTCheckpointConfig(**base | rest | fields)))

    assert default() == "opt/2.7B/trt_ckpt/fp16/1-gpu"
    assert default(quant_algo="W8A16") == "opt/2.7B/trt_ckpt/int8_weightonly/1-gpu"
    assert default(quant_algo="W4A16", tp_size=2) == "opt/2.7B/trt_ckpt/int4_weightonly/2-gpu"
    assert default(hidden_size=4096, dtype="bfloat16") == "opt/6.7B/trt_ckpt/bf16/1-gpu"
    with pytest.raises(Blip2Error, match="--output_dir"):
        default(hidden_size=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    opt_models.opt(**SHAPE).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dtype", "float64"], "invalid choice"),
        (["--tp", "2"], "unrecognized arguments: --tp"),
        (["--tp_size", "0"], "at least 1"),
        (["--tp_size", "3"], "--tp_size 3 does not divide this model's num_attention_heads of 4"),
        (["--use_weight_only", "--tp_size", "2"], "multiple of 64 x tp_size = 128"),
        (["--use_weight_only", "--dtype", "float32"], "quantises no float32"),
        (["--model_dir", "/absent"], "/absent is no directory"),
        ([], "--output_dir"),
    ],
)
def test_wrong_usage_is_one_line(source, flags, message, tmp_path, monkeypatch, capsys):
    output = ["--output_dir", str(tmp_path / "out")] if flags else []
    argv = [SCRIPT, "--model_dir", str(source), *output, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(opt_models.ROOT / SCRIPT), run_name="__main__")
    assert end.value.code == 2
    stdout, stderr = capsys.readouterr()
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert stdout == ""
    assert not (tmp_path / "out").exists()


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    model = opt_models.opt(**SHAPE)
    model.model.decoder.layers[1].fc1.weight.data[3, 4] = 1e6
    model.save_pretrained(tmp_path / "hf")
    paths = ("--model_dir", tmp_path / "hf", "--output_dir", tmp_path / "opt")
    done = opt_models.run(SCRIPT, *paths)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "transformer.layers.1.mlp.fc.weight" in done.stderr
    assert snapshot(tmp_path / "opt") == {}
    [tensors] = convert(model, tmp_path, dtype="bfloat16")
    assert tensors["transformer.layers.1.mlp.fc.weight"][3, 4] > 9e5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 98}, "embed_tokens.weight .* config.json calls for"),
        ({"num_hidden_layers": 3}, "no tensor model.decoder.layers.2"),
        ({"ffn_dim": 128}, "fc1.weight"),
        ({"enable_bias": False}, "no biases"),
        ({"_remove_final_layer_norm": True}, "no last LayerNorm"),
    ],
)
def test_checkpoints_that_do_not_fit_their_config(source, tmp_path, changes, message):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Blip2Error, match=message):
        conversion.target_config(open_checkpoint(tmp_path), conversion.ConversionOptions())


def test_parallel_embedding_of_350m_is_refused(tmp_path):
    opt_models.opt(**opt_models.POST_LN).save_pretrained(tmp_path)
    options = conversion.ConversionOptions(tp_size=2, use_parallel_embedding=True)
    with pytest.raises(Blip2Error, match="use_parallel_embedding"):
        conversion.target_config(open_checkpoint(tmp_path), options)


def test_help_is_immediate():
    program = f"import sys, runpy; sys.argv = ['{SCRIPT}', '--help']\n" + textwrap.dedent(f"""
        try:
            runpy.run_path('{SCRIPT}', run_name='__main__')
        except SystemExit as end:
            assert end.code == 0
        heavy = {{'torch', 'numpy', 'safetensors', 'transformers'}} & sys.modules.keys()
        assert not heavy, heavy
    """)
    done = opt_models.run("-c", program)
    assert done.returncode == 0, done.stderr
    assert "--weight_only_precision" in done.stdout

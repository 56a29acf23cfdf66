"""What is opened is compared before it is read; what was verified or compiled is kept."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import models
import pytest
import torch
from conftest import run_program

from blip2 import artifacts, cache, pipeline
from blip2.artifacts import tensor_files, verification
from blip2.engines import Places
from blip2.errors import Blip2Error


@pytest.fixture
def no_weights_are_read(monkeypatch):
    def read(*_args, **_options):
        raise AssertionError("weights are read")

    monkeypatch.setattr(tensor_files.Loader, "__call__", read)
    monkeypatch.setattr("blip2.vision.onnx_runtime.open_graph", read)


@pytest.fixture(scope="module")
def other_opt(tmp_path_factory) -> Path:
    """A BLIP-2 whose OPT has another hidden size than the tiny one's."""
    directory = tmp_path_factory.mktemp("other")
    models.tiny_blip2(directory, text={"hidden_size": 32, "word_embed_proj_dim": 32})
    return directory


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("engine", ["onnx", "checkpoint"])
@pytest.mark.parametrize("fault", ["hidden size", "tokenizer", "query tokens", "directory"])
def test_what_does_not_fit_is_said_before_weights_are_read(
    engine, fault, tiny_export, tiny_opt, other_opt, tmp_path
):
    output = shutil.copytree(tiny_export.output, tmp_path / "out")
    engine_dir = output / "onnx" if engine == "onnx" else tiny_export.checkpoint
    opt, tokens, tokenizer = tiny_opt, output / "query_tokens.pt", None
    if fault == "hidden size":
        opt, message = other_opt, "hidden size 64, this OPT has 32"
    elif fault == "tokenizer":
        tokenizer, message = tmp_path / "tokenizer", "the tokenizer has 1000 tokens"
        words = json.loads((output / "tokenizer" / "tokenizer.json").read_text())
        words["model"]["vocab"]["far"] = 999
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text(json.dumps(words))
    elif fault == "query tokens":
        if engine == "checkpoint":
            pytest.skip("a checkpoint has its own")
        message = "query_tokens.pt has shape"
        torch.save(torch.zeros(1, 3, 32), tokens)
        sidecar = tokens.with_suffix(".json")
        facts = json.loads(sidecar.read_text()) | artifacts.describe_file(tokens)
        sidecar.write_text(json.dumps(facts))
    else:
        opt, message = tmp_path, "holds no OPT"
    with pytest.raises(Blip2Error, match=message):
        pipeline.open_pipeline(Places.of(engine_dir, opt, tokens, tokenizer))


@pytest.mark.usefixtures("no_weights_are_read")
def test_weights_are_read_where_all_fits(tiny_export, tiny_opt):
    with pytest.raises(AssertionError, match="weights are read"):
        pipeline.open_pipeline(Places.of(tiny_export.output, tiny_opt))


def test_one_checkpoint_directory_is_enough(tiny_export, tmp_path):
    """For both engines, with the answer of its conversion to float16, and by its hub id too."""
    opt = tmp_path / "opt"
    done = run_program(
        *("opt/convert_checkpoint.py", "--model_dir", tiny_export.checkpoint, "--output_dir", opt)
    )
    assert done.returncode == 0, done.stderr
    common = ("--input_dir", tiny_export.picture, "--input_text", "what?", "--json")
    converted = run_program(
        *("run.py", "--engine_dir", tiny_export.output / "onnx", "--opt_engine_dir", opt),
        *("--query_tokens", tiny_export.output / "query_tokens.pt", *common),
    )
    hub = tmp_path / "hub" / "models--someone--blip2"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0123")
    shutil.copytree(tiny_export.checkpoint, hub / "snapshots" / "0123")
    for location in (tiny_export.checkpoint, "someone/blip2"):
        direct = run_program(
            *("run.py", "--engine_dir", location, "--opt_engine_dir", location, *common),
            cwd=tmp_path,
            HF_HUB_CACHE=str(tmp_path / "hub"),
        )
        assert direct.returncode == 0, direct.stderr
        for [found], [expected] in zip(
            json.loads(direct.stdout)["answers"],
            json.loads(converted.stdout)["answers"],
            strict=True,
        ):
            # Scores are sums: of another engine's pictures the same but for their last digits.
            for name in ("score", "log_prob"):
                assert found.pop(name) == pytest.approx(expected.pop(name), abs=1e-4)
            assert found == expected


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blip2"


def verify(path: Path, monkeypatch) -> int:
    """Compare a file with its sidecar; return how many files were read for that."""
    read, sha256 = [], verification.sha256

    def counted(path: Path) -> str:
        read.append(path)
        return sha256(path)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "sha256", counted)
        artifacts.Verification({path: "test"}).finish()
    return len(read)


def test_a_file_is_verified_once_until_it_changes(tmp_path, own_cache, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"first")
    artifacts.write_sidecar(path)
    assert [verify(path, monkeypatch) for _ in range(3)] == [1, 0, 0]
    path.write_bytes(b"other")  # as large
    for _ in range(2):  # what is refused is not remembered
        with pytest.raises(Blip2Error, match="is not the file that its description"):
            verify(path, monkeypatch)
    artifacts.write_sidecar(path)
    assert [verify(path, monkeypatch) for _ in range(2)] == [1, 0]
    shutil.rmtree(own_cache)
    assert verify(path, monkeypatch) == 1


@pytest.mark.usefixtures("own_cache")
def test_what_a_program_wrote_here_is_verified(tmp_path, monkeypatch):
    with artifacts.staging(tmp_path / "out") as stage:
        (stage / "a.pt").write_bytes(b"first")
        artifacts.write_sidecar(stage / "a.pt")
    path = tmp_path / "out" / "a.pt"
    assert verify(path, monkeypatch) == 0
    path.write_bytes(b"other")
    with pytest.raises(Blip2Error, match="is not the file that its description"):
        verify(path, monkeypatch)


@pytest.mark.usefixtures("own_cache")
def test_a_verified_file_has_to_have_its_sidecars_hash(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"first")
    artifacts.write_sidecar(path)
    verify(path, monkeypatch)
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(Blip2Error, match="is not the file that its description"):
        verify(path, monkeypatch)


def test_the_cache_forgets_what_is_damaged_and_never_fails(tmp_path, own_cache, monkeypatch):
    cache.write("kind", "key", b"content")
    assert cache.read("kind", "key") == b"content"
    assert [path.name for path in (own_cache / "kind").iterdir()] == ["key"]
    entry = own_cache / "kind" / "key"
    for damaged in (entry.read_bytes()[:-1], entry.read_bytes()[:-1] + b"x", b""):
        entry.write_bytes(damaged)
        assert cache.read("kind", "key") is None
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.write("kind", "key", b"content")
    assert cache.read("kind", "key") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_not_kept_leaves_nothing_behind(own_cache, monkeypatch, error):
    """Ctrl-C goes on, no room left does not."""

    def fail(*_):
        raise error

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(error) if error is KeyboardInterrupt else contextlib.nullcontext():
        cache.write("kind", "key", b"content")
    assert list((own_cache / "kind").iterdir()) == []


def test_kernels_are_compiled_once_until_their_source_changes(tmp_path, own_cache, monkeypatch):
    pytest.importorskip("cuda.bindings")
    from blip2.gpu import compiled

    source, header = tmp_path / "kernel.cu", tmp_path / "part.cuh"
    source.write_text('#include "part.cuh"\nextern "C" __global__ void add(int* x) { *x += N; }\n')
    header.write_text("#define M 1\n")
    made, compile_source = [], compiled.compile_source

    def counted(*arguments):
        made.append(arguments)
        return compile_source(*arguments)

    monkeypatch.setattr(compiled, "compile_source", counted)

    def cubin(macros=(("N", 1),), architecture="sm_90") -> bytes:
        return compiled.kept_cubin(source, macros, architecture)

    first = cubin()
    assert cubin() == first == compile_source(source, (("N", 1),), "sm_90")
    assert len(made) == 1
    [entry] = (own_cache / "cubins").iterdir()
    entry.write_bytes(entry.read_bytes()[:-8])
    assert cubin() == first
    assert len(made) == 2
    cubin((("N", 2),))
    cubin(architecture="sm_80")
    header.write_text("#define M 2\n")
    cubin()
    assert len(made) == 5

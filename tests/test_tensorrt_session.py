"""The session on TensorRT plans: real plans, and a runtime that enforces TensorRT's rules.

tests/gpu/test_tensorrt.py runs some of these tests with a GPU's buffers, streams and graphs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tensorrt_double import CpuGpu, runtime_double, stage_modules

from blip2 import artifacts, cache
from blip2.engines import VISION, engine_for, open_vision_session
from blip2.errors import Blip2Error
from blip2.vision.tensorrt_plans import QFORMER, VIT, read_plan_sidecar
from blip2.vision.tensorrt_session import TensorRTSession


class Setup:
    """A copy of the plans, the double that runs them, and what they should yield."""

    def __init__(self, tiny_plans, directory: Path, gpu) -> None:
        shutil.copytree(tiny_plans.plan, directory / "plan")
        for name in ("query_tokens.pt", "query_tokens.json"):
            shutil.copy(tiny_plans.output / name, directory)
        self.plan, self.query_tokens, self.gpu = (
            directory / "plan",
            directory / "query_tokens.pt",
            gpu,
        )
        self.modules = stage_modules(tiny_plans.checkpoint)
        self.vit, self.qformer = self.modules.values()

    def double(self, name: str = "tensorrt_rtx", version: str = "1.7.1.116"):
        plans = {}
        for stage, module in self.modules.items():
            facts = read_plan_sidecar(self.plan, stage)
            plans[facts.path] = (facts, module.to(self.gpu.device))
        return runtime_double(name, version, self.gpu, plans)

    def edit(self, stage, **changes) -> None:
        """Change fields of a plan's sidecar."""
        path = (self.plan / stage.plan_file).with_suffix(".json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def open(self) -> TensorRTSession:
        return TensorRTSession(self.plan, self.query_tokens, self.gpu)

    def expected(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            image_embeds = self.vit(pixel_values.to(self.gpu.device, torch.float16))
            tokens = torch.load(self.query_tokens).half().to(self.gpu.device)
            ones = torch.ones(image_embeds.shape[:2], dtype=torch.int64, device=self.gpu.device)
            return image_embeds, self.qformer(
                tokens.expand(len(pixel_values), -1, -1), image_embeds, ones
            )


@pytest.fixture
def setup(tiny_plans, tmp_path):
    return Setup(tiny_plans, tmp_path, CpuGpu())


@pytest.fixture
def session(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", setup.double())
    return setup.open()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 3, 8, 11, 24])
def test_session_equals_the_modules(session, setup, batch):
    expected_embeds, expected_output = setup.expected(pictures(batch))
    for _ in range(2):  # prepared and captured, then replayed
        image_embeds = session.vit(pictures(batch))
        query_output = session.qformer(image_embeds)
        assert image_embeds.dtype == query_output.dtype == torch.float16
        close(image_embeds, expected_embeds)
        close(query_output, expected_output)


def test_bytes_give_what_their_pixel_values_give(session):
    pixels = torch.randint(256, (11, 3, 28, 28), dtype=torch.uint8)
    table = torch.from_numpy(session.preprocessing.table())
    values = torch.stack([table[c][pixels[:, c].long()] for c in range(3)], 1)
    expected = session.vit(values).clone()
    assert torch.equal(session.vit(pixels), expected)


def test_batches_of_all_sizes_in_turn(session, setup):
    for index, batch in enumerate([2, 5, 2, 8, 1, 5, 8, 1, 17, 2]):
        pixel_values = pictures(batch, seed=index)
        expected = setup.expected(pixel_values)
        image_embeds = session.vit(pixel_values)
        close(image_embeds, expected[0])
        close(session.qformer(image_embeds), expected[1])


def test_one_context_and_graph_a_batch_size_and_no_copy_between_the_stages(session, setup):
    trt = sys.modules["tensorrt_rtx"]
    for _ in range(3):
        for batch in (1, 4):
            session.qformer(session.vit(pictures(batch)))
    assert len(trt.contexts) == 4  # two stages, two batch sizes
    by_stage = {id(context.engine.facts): context for context in trt.contexts}
    vit, qformer = by_stage.values()
    assert vit.addresses["output"] == qformer.addresses["image_embeds"]
    assert all(context.executions == 2 for context in trt.contexts)  # one run, one capture
    if isinstance(setup.gpu, CpuGpu):
        assert setup.gpu.captures == 4
        assert setup.gpu.replays == 12


def test_buffers_are_allocated_once(session):
    results = [session.vit(pictures(batch)) for batch in (1, 8, 3)]
    assert len({result.data_ptr() for result in results}) == 1
    outputs = [session.qformer(session.vit(pictures(batch))) for batch in (1, 8, 3)]
    assert len({output.data_ptr() for output in outputs}) == 1


def test_qformer_takes_embeddings_from_anywhere(session, setup):
    expected_embeds, expected_output = setup.expected(pictures(6))
    own = session.vit(pictures(6))
    close(session.qformer(own[2:5]), expected_output[2:5])  # an inner part of the ViT's buffer
    close(session.qformer(own[::2]), expected_output[::2])  # it starts where the buffer does
    assert torch.equal(session.vit(pictures(6)), own)
    close(session.qformer(expected_embeds.clone()), expected_output)
    close(session.qformer(expected_embeds.float()), expected_output)
    transposed = expected_embeds.transpose(1, 2).contiguous().transpose(1, 2)
    close(session.qformer(transposed), expected_output)
    close(session.qformer(own), expected_output)
    close(own, expected_embeds)  # nothing above wrote into the ViT's result


@pytest.mark.parametrize("vit, qformer", [((1, 2, 3), (4, 4, 6)), ((2, 4, 6), (1, 2, 3))])
def test_plans_of_different_profiles(setup, monkeypatch, vit, qformer):
    """Batches below a plan's smallest are filled up, the smaller of the two largest limits both."""
    for stage, profile in ((VIT, vit), (QFORMER, qformer)):
        setup.edit(stage, profile=dict(zip(("min", "opt", "max"), profile, strict=True)))
    trt = setup.double()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    session = setup.open()
    assert session.max_batch_size == 3
    for batch in (7, 2, 1):
        expected = setup.expected(pictures(batch))
        image_embeds = session.vit(pictures(batch))
        close(image_embeds, expected[0])
        close(session.qformer(image_embeds), expected[1])
    if qformer[0] > vit[2]:  # it reads more rows than the ViT's buffer has: not in place, then
        written = {context.addresses.get("output") for context in trt.contexts} - {None}
        assert not written & {context.addresses.get("image_embeds") for context in trt.contexts}


def test_kernels_that_rtx_compiled_are_kept_for_the_next_process(setup, monkeypatch):
    def compiled(batch: int) -> int:
        """How many plans the first run of a batch size, in a new process, compiles for."""
        trt = setup.double()
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
        session, expected = setup.open(), setup.expected(pictures(batch))[1]
        for _ in range(2):
            close(session.qformer(session.vit(pictures(batch))), expected)
        return len(trt.compiled)

    def rebuild(stage, build: int) -> None:
        plan = setup.plan / stage.plan_file
        plan.write_text(f"{stage.label}, build {build}, with other kernels")
        setup.edit(stage, **artifacts.describe_file(plan))

    for build in (1, 2):  # nor has it what the plans of before were compiled for
        for stage in (VIT, QFORMER):
            rebuild(stage, build)
        assert [compiled(batch) for batch in (2, 2, 3, 2, 3)] == [2, 0, 2, 0, 0]
    folder = cache.directory() / "tensorrt_rtx"
    for file in folder.iterdir():
        file.write_bytes(b"damaged")
    assert [compiled(2), compiled(2)] == [2, 0]
    monkeypatch.setattr("tensorrt_double.RuntimeCache._environment", lambda _: ["another driver"])
    assert [compiled(2), compiled(2)] == [2, 0]


def test_kernels_of_another_driver_are_no_reason_for_what_fails_later(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", setup.double())
    session = setup.open()
    session.qformer(session.vit(pictures(2)))
    monkeypatch.setattr("tensorrt_double.RuntimeCache._environment", lambda _: ["another driver"])
    monkeypatch.setattr("tensorrt_double.Context.execute_async_v3", lambda *_: False)
    with pytest.raises(Blip2Error, match="on a batch of 2: it does not say why"):
        setup.open().vit(pictures(2))


def test_without_a_place_for_compiled_kernels_it_runs(session, setup, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    close(session.vit(pictures(2)), setup.expected(pictures(2))[0])


@pytest.mark.parametrize("version", ["10.14.1.48.post1", "10.16.1.11", "11.4.0.106"])
def test_session_on_standard_tensorrt(setup, monkeypatch, version):
    for stage in (VIT, QFORMER):
        setup.edit(stage, tensorrt={"flavour": "tensorrt", "version": version})
    monkeypatch.setitem(sys.modules, "tensorrt", setup.double("tensorrt", version))
    session = setup.open()
    close(session.qformer(session.vit(pictures(3))), setup.expected(pictures(3))[1])


def test_plan_that_cannot_be_captured_still_runs(setup, monkeypatch):
    trt = setup.double()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    monkeypatch.setattr("tensorrt_double.Context.is_stream_capturable", lambda *_: False)
    session = setup.open()
    for _ in range(2):
        close(session.vit(pictures(3)), setup.expected(pictures(3))[0])
    assert not any(context.captured for context in trt.contexts)


def test_session_describes_itself(session, setup):
    assert session.max_batch_size == 8
    assert session.num_query_tokens == 4
    assert session.dtype == torch.float16
    assert session.device == setup.gpu.device
    assert (session.preprocessing.height, session.preprocessing.width) == (28, 28)


def _one_fault(setup, monkeypatch, match: str, trt=None) -> None:
    """Opening fails in one line, and before anything was given to TensorRT's runtime."""
    trt = trt or setup.double()
    trt.Runtime = lambda _log: pytest.fail("the runtime was reached")
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    with pytest.raises(Blip2Error, match=match) as error:
        setup.open()
    assert "\n" not in str(error.value)


@pytest.fixture
def faulty(tiny_plans, tmp_path):
    return Setup(tiny_plans, tmp_path, CpuGpu())


def test_truncated_plan(faulty, monkeypatch):
    plan = faulty.plan / VIT.plan_file
    trt = faulty.double()
    plan.write_bytes(plan.read_bytes()[:-1])
    _one_fault(faulty, monkeypatch, r"visual_encoder_fp16\.plan has \d+ bytes", trt)


@pytest.mark.parametrize("stage", [VIT, QFORMER], ids=["vit", "qformer"])
@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_missing_file(faulty, monkeypatch, stage, suffix):
    trt = faulty.double()
    (faulty.plan / stage.plan_file).with_suffix(suffix).unlink()
    _one_fault(faulty, monkeypatch, "does not exist; make it with: python build_vit_qformer", trt)


def test_qformer_given_as_vit(faulty, monkeypatch):
    trt = faulty.double()
    for suffix in (".plan", ".json"):
        vit, qformer = ((faulty.plan / s.plan_file).with_suffix(suffix) for s in (VIT, QFORMER))
        shutil.copy(qformer, vit)
    _one_fault(faulty, monkeypatch, "is not a plan of the ViT: it takes query_tokens", trt)


def test_sidecar_that_describes_no_plan(faulty, monkeypatch):
    trt = faulty.double()
    faulty.edit(VIT, tensorrt=None)
    _one_fault(faulty, monkeypatch, "does not describe visual_encoder_fp16.plan", trt)
    faulty.edit(VIT, tensorrt={"flavour": "torch", "version": "2"})
    _one_fault(faulty, monkeypatch, "built with 'torch'", trt)


def test_another_version(faulty, monkeypatch):
    trt = faulty.double(version="1.8.0.1")
    _one_fault(faulty, monkeypatch, r"built with TensorRT-RTX 1\.7\.1\.116, .* 1\.8\.0\.1 is", trt)
    faulty.edit(VIT, tensorrt={"flavour": "tensorrt", "version": "10.16.1.11"})
    _one_fault(faulty, monkeypatch, r"built with TensorRT 10.16.1.11, .* with TensorRT-RTX 1.7")


def test_plan_of_a_tensorrt_that_is_not_installed(faulty, monkeypatch):
    for stage in (VIT, QFORMER):
        faulty.edit(stage, tensorrt={"flavour": "tensorrt", "version": "10.16.1.11"})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Blip2Error, match=r"no TensorRT can be imported.*pip install tensorrt"):
        faulty.open()


def test_another_gpu(faulty, monkeypatch):
    faulty.gpu.compute_capability = "9.0"
    _one_fault(faulty, monkeypatch, r"built for compute capability 8\.9, 12\.0, .*Double has 9\.0")


def test_another_checkpoint(faulty, monkeypatch):
    trt = faulty.double()
    faulty.edit(QFORMER, source={"fingerprint": "another"})
    _one_fault(faulty, monkeypatch, "come from different checkpoints; make both again", trt)


def test_embeddings_that_do_not_fit(faulty, monkeypatch):
    trt = faulty.double()
    faulty.edit(VIT, outputs={"output": {"dtype": "float16", "shape": ["batch", 5, 47]}})
    _one_fault(faulty, monkeypatch, "yields other embeddings than", trt)


def test_query_tokens_that_do_not_fit(faulty, monkeypatch):
    trt = faulty.double()
    torch.save(torch.zeros(1, 3, 32), faulty.query_tokens)
    sidecar = faulty.query_tokens.with_suffix(".json")
    size = faulty.query_tokens.stat().st_size
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"size": size}))
    _one_fault(faulty, monkeypatch, r"query_tokens\.pt has shape \(1, 3, 32\)", trt)


def test_no_gpu(faulty, monkeypatch):
    faulty.gpu = None
    trt = runtime_double("tensorrt_rtx", "1.7.1.116", None, {})
    _one_fault(faulty, monkeypatch, r"need an NVIDIA GPU.*--engine_dir onnx", trt)


def test_plan_that_tensorrt_refuses(faulty, monkeypatch):
    trt = faulty.double()
    plan = faulty.plan / VIT.plan_file
    plan.write_bytes(bytes([plan.read_bytes()[0] ^ 1]) + plan.read_bytes()[1:])
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    with pytest.raises(Blip2Error, match=r"cannot read .*_fp16\.plan: Serialization assertion"):
        faulty.open().load()


def test_plan_whose_tensors_are_not_its_sidecars(faulty, monkeypatch):
    trt = faulty.double()
    for stage, side, name in ((VIT, "outputs", "output"), (QFORMER, "inputs", "image_embeds")):
        sidecar = read_plan_sidecar(faulty.plan, stage).sidecar
        sidecar[side][name]["dtype"] = "float32"
        faulty.edit(stage, **{side: sidecar[side]})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    with pytest.raises(Blip2Error, match="holds other tensors than its sidecar says"):
        faulty.open().load()


def test_refusal_while_running_gives_tensorrts_reason(session, monkeypatch):
    for method in (
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"tensorrt_double.Context.{method}", lambda *_: False)
            with pytest.raises(
                Blip2Error, match=r"cannot run .*_fp16\.plan on a batch of 2: it does"
            ):
                session.vit(pictures(2))
    session.vit(pictures(2))  # nothing half-prepared was kept


def test_plans_win_over_onnx(faulty, tiny_plans, monkeypatch):
    shutil.copytree(tiny_plans.onnx, faulty.plan, dirs_exist_ok=True)
    assert engine_for(VISION, faulty.plan)
    monkeypatch.setattr("blip2.vision.tensorrt_session.Gpu", CpuGpu)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", faulty.double())
    session = open_vision_session(faulty.plan, faulty.query_tokens)
    assert isinstance(session, TensorRTSession)
    (faulty.plan / VIT.plan_file).unlink()
    session = open_vision_session(faulty.plan, faulty.query_tokens)
    assert not isinstance(session, TensorRTSession)

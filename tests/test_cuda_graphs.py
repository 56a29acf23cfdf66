"""When graphs are captured and which batch sizes have one, on a CPU; tests/gpu has the real ones."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref

import pytest
import torch

from blip2.gpu import cuda_graphs
from blip2.gpu.cuda_graphs import Graph
from blip2.gpu.kernel_launch import compile_ahead
from blip2.vision.torch_session import (
    MAX_BATCH_SIZE,
    Graphs,
    TorchSession,
    gpu_stages,
    prepared_size,
)


@pytest.fixture
def captures(monkeypatch) -> list:
    """The pools of the captures, which a replay runs again."""
    pools = []

    def capture(launch, pool=None):
        pools.append(pool)
        launch()  # what PyTorch does in a capture: outputs get their places
        return launch

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return pools


def test_a_graph_is_captured_for_the_second_call(captures):
    runs, graph = [], Graph()

    def launch() -> None:
        runs.append(1)

    with compile_ahead():
        graph(launch)
        graph(launch)
    assert not captures
    graph(launch)
    assert not captures
    graph(launch)
    graph(launch)
    assert len(captures) == 1
    assert len(runs) == 2 + 1 + 1 + 2  # ahead, as it is, captured, replayed


def test_without_memory_for_a_graph_all_goes_on_as_it_is(monkeypatch):
    """What a failed capture had made goes, also where a cycle holds it."""
    lost, tried = [], []

    class Buffer:
        pass

    def capture(_launch, _pool):
        buffer = Buffer()
        buffer.itself = buffer
        lost.append(weakref.ref(buffer))
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 134.00 MiB.")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    runs, graph = [], Graph()
    gc.disable()
    try:
        for _ in range(4):
            graph(lambda: runs.append(1))
        assert [buffer() for buffer in lost] == [None]
    finally:
        gc.enable()
    assert (len(runs), len(tried)) == (4, 1)


def test_another_error_of_a_capture_is_raised(monkeypatch):
    def capture(_launch, _pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    graph = Graph()
    graph(lambda: None)
    with pytest.raises(RuntimeError, match="not permitted"):
        graph(lambda: None)


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch, collects):
    """Garbage may hold another graph, whose end a capture does not survive."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    seen = []

    def launch() -> None:
        seen.append(gc.isenabled())

    def fail() -> None:
        raise RuntimeError("CUDA error")

    try:
        if not collects:
            gc.disable()
        cuda_graphs.capture(launch)
        seen.append(gc.isenabled())
        with pytest.raises(RuntimeError):
            cuda_graphs.capture(fail)
        cuda_graphs.capture(launch)
        seen.append(gc.isenabled())
    finally:
        gc.enable()
    assert seen == [False, collects, False, collects]


def test_sizes_are_few_and_hold_every_batch():
    sizes = [prepared_size(pictures) for pictures in range(1, MAX_BATCH_SIZE + 1)]
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert all(size >= pictures for pictures, size in enumerate(sizes, start=1))
    assert all(prepared_size(size) == size for size in sizes)


def test_batches_of_every_size_share_few_graphs(captures):
    stage = Graphs(lambda x: 2 * x + 1)
    for _ in range(3):
        for pictures in range(MAX_BATCH_SIZE, 0, -1):
            x = torch.randn(pictures, 3)
            assert torch.equal(stage(x), 2 * x + 1)
    assert len(captures) == 11
    assert len(set(map(id, captures))) == 1  # one memory for all


def test_what_owns_a_graph_goes_with_its_last_reference(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", lambda _launch, _pool: lambda: None)

    class Step:
        def __init__(self) -> None:
            self.graph = Graph()

        def launch(self) -> None:
            pass

    step = Step()
    gone = weakref.ref(step)
    for _ in range(3):
        step.graph(step.launch)
    gc.disable()  # it may be gigabytes: nobody waits for the collector
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_released_graphs_are_made_anew_in_other_memory(captures):
    stage = Graphs(lambda x: x + 1)
    for _ in range(2):
        for _ in range(2):
            stage(torch.zeros(4, 1))
        stage.release()
    assert len(set(map(id, captures))) == 2


def test_a_session_whose_batch_was_halved_makes_no_more_graphs(captures, monkeypatch):
    """Their memory is beside what a launch takes, which had not been enough already."""
    vision = pytest.importorskip("blip2.vision.cuda")
    monkeypatch.setattr(vision.CudaVisionTransformer, "takes", lambda _: False)
    monkeypatch.setattr(vision, "CudaQFormer", lambda qformer, _: qformer)
    session = object.__new__(TorchSession)
    session._stages = gpu_stages(lambda x: 2 * x, lambda x: x - 1, torch.zeros(1))
    session.max_batch_size = 64

    def look() -> None:
        x = torch.randn(3, 5)
        assert torch.equal(session._vit(x), 2 * x)
        assert torch.equal(session._qformer(x), x - 1)

    for _ in range(2):
        look()
    assert len(captures) == 2  # one a stage
    assert session.halve_batch(64) == 32
    for _ in range(3):
        look()
    assert len(captures) == 2

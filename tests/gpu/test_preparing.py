"""What sessions keep on a GPU, and graphs captured while other threads work."""

from __future__ import annotations

import gc
import threading

import models
import pytest
import torch
from safetensors.torch import save_file

from blip2.artifacts.tensor_files import Loader, mapped, read_header
from blip2.checkpoints import open_checkpoint
from blip2.gpu.cuda_graphs import capture
from blip2.images import Preprocessing
from blip2.language.native.session import NativeSession
from blip2.language.session import GenerationOptions
from blip2.vision import modules
from blip2.vision.cuda import CudaVisionTransformer
from blip2.vision.torch_session import MAX_BATCH_SIZE, TorchSession, open_checkpoint_session

GPU = torch.device("cuda")


def test_memory_is_pinned_while_another_thread_captures():
    capturing, pinned = threading.Event(), threading.Event()
    buffer, errors = torch.zeros(8, device=GPU), []

    def pin() -> None:
        capturing.wait(timeout=30)
        try:
            torch.empty(123_456_789, dtype=torch.uint8, pin_memory=True)  # no size that is cached
        except Exception as error:
            errors.append(error)
        pinned.set()

    def launch() -> None:
        buffer.add_(1)
        capturing.set()
        assert pinned.wait(timeout=30)
        buffer.add_(1)

    other = threading.Thread(target=pin)
    other.start()
    replay = capture(launch)
    other.join()
    assert not errors
    replay()
    replay()
    assert buffer.tolist() == [4.0] * 8


def test_graphs_that_are_garbage_end_no_capture(device):
    """Python would collect them amid the next one, whose launches make objects enough for that."""
    buffer = torch.zeros(8, device=device)

    def launch() -> None:
        buffer.add_(1)
        kept = [[] for _ in range(5000)]
        buffer.add_(len(kept) // 5000)

    launch()
    gc.collect()
    buffer.zero_()
    for replays in range(1, 4):
        replay = capture(launch)
        garbage = [replay]
        garbage.append(garbage)
        replay()
        del replay, garbage
        torch.randn(1, device=device)  # which a capture that was ended so makes impossible
        assert buffer.tolist() == [2.0 * replays] * 8


def test_tensors_reach_the_gpu_as_they_are_stored(tmp_path):
    """Larger and smaller ones than the buffers, from several threads at once."""
    sizes = [1, 1000, (4 << 20) - 1, 4 << 20, (9 << 20) + 5, 0]
    tensors = {str(n): torch.randint(-128, 128, (n,), dtype=torch.int8) for n in sizes}
    tensors["half"] = torch.randn(300, 7000).half()
    save_file(tensors, tmp_path / "model.safetensors")
    stored, load, wrong = read_header(tmp_path / "model.safetensors"), Loader(GPU), []

    def check() -> None:
        for name, tensor in tensors.items():
            if not torch.equal(load(stored[name]).cpu(), tensor):
                wrong.append(name)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(mapped(stored["half"]), tensors["half"])


def test_what_is_captured_already_may_be_prepared_for(tmp_path):
    models.tiny_blip2(tmp_path)
    session = open_checkpoint_session(tmp_path, tmp_path)
    pixel_values = torch.randn(2, 3, 28, 28, device=GPU).half()
    expected = session.qformer(session.vit(pixel_values)).clone()
    session.qformer(session.vit(pixel_values))
    session.prepare(2)
    for other in (torch.zeros_like(pixel_values), pixel_values):
        found = session.qformer(session.vit(other))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_heads", [3, 4], ids=["our kernels", "heads that they do not take"])
def test_stages_of_every_batch_size_are_right_and_share_memory(num_heads, tmp_path):
    models.tiny_blip2(tmp_path, vision={"num_attention_heads": num_heads})
    session = open_checkpoint_session(tmp_path, tmp_path)
    assert session.dtype == torch.float16
    checkpoint = open_checkpoint(tmp_path)
    vit = modules.load_vision_transformer(checkpoint, torch.float64, GPU)
    assert CudaVisionTransformer.takes(vit) == (num_heads == 3)
    qformer = modules.load_qformer(checkpoint, torch.float64, GPU)
    query_tokens = checkpoint.tensor("query_tokens").double().to(GPU)
    pixel_values = torch.randn(MAX_BATCH_SIZE, 3, 28, 28, device=GPU).half()
    embeds = vit(pixel_values.double())
    outputs = qformer(query_tokens.expand(MAX_BATCH_SIZE, -1, -1), embeds, None)
    reserved = []
    for _ in range(3):  # as it is, captured, replayed
        for pictures in range(MAX_BATCH_SIZE, 0, -1):
            got = session.vit(pixel_values[:pictures])
            assert (got.double() - embeds[:pictures]).norm() < 5e-3 * embeds[:pictures].norm()
            got = session.qformer(got)
            assert (got.double() - outputs[:pictures]).norm() < 5e-3 * outputs[:pictures].norm()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[1]
    assert len(session._stages.vit._prepared) == 11


def test_bytes_become_pixel_values_on_the_gpu(tmp_path):
    """More than a graph takes, from pinned memory; with the bits that the host would give them."""
    models.tiny_blip2(tmp_path)
    session = open_checkpoint_session(tmp_path, tmp_path)
    pixels = torch.randint(256, (MAX_BATCH_SIZE + 9, 3, 28, 28), dtype=torch.uint8).pin_memory()
    table = torch.from_numpy(session.preprocessing.table()).half()
    expected = torch.stack([table[c][pixels[:, c].long()] for c in range(3)], 1)
    assert torch.equal(session.pixel_values(pixels).cpu(), expected)
    assert torch.equal(session.vit(pixels), session.vit(expected))


def test_float32_is_computed_in_float32(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint.checkpoint)
    session = TorchSession(checkpoint, Preprocessing.of(checkpoint), torch.float32, GPU)
    pixel_values = torch.randn(3, 3, 28, 28, device=GPU)
    expected = modules.load_vision_transformer(checkpoint, torch.float64, GPU)(
        pixel_values.double()
    )
    got = session.vit(pixel_values)
    assert got.dtype == torch.float32
    assert (got.double() - expected).norm() < 2e-6 * expected.norm()  # TF32 would be off by 1e-4


def test_a_limited_session_lets_its_caches_go(demo_opt):
    session = NativeSession(demo_opt)
    session.load()
    options = GenerationOptions(end_id=1, max_output_len=5)

    def ask(requests: int) -> None:
        ids = [torch.arange(3, 9)] * requests
        session.generate(ids, torch.zeros(requests, 0, session.hidden_size, device=GPU), options)

    ask(1)
    session._model.release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ask(64)
    ask(64)
    assert torch.cuda.memory_allocated() > before + (1 << 20)
    session.halve_batch(64)
    assert torch.cuda.memory_allocated() <= before + (1 << 16)
    ask(64)  # in two batches

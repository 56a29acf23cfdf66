"""Tensors read from their place in a file, against the format's own reader."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blip2 import cpu
from blip2.artifacts.tensor_files import (
    FiniteChecks,
    Loader,
    StoredTensor,
    UnknownType,
    is_finite,
    read_header,
)

CPU = torch.device("cpu")


def test_tensors_are_those_of_the_formats_own_reader(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {
        "half": torch.randn(3, 5).half(),
        "odd": torch.arange(7, dtype=torch.uint8),  # what follows it is not aligned
        "brain": torch.randn(4, 3).bfloat16(),
        "eight": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "float": torch.randn(2, 3, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    stored, expected, load = read_header(file), load_file(file), Loader(CPU)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(load(stored[name]), tensor)


def test_a_transposed_tensor_is_read_column_by_column(tmp_path):
    file = tmp_path / "weights"
    weight = torch.randn(3, 5)
    file.write_bytes(b"12345678" + weight.T.contiguous().numpy().tobytes())
    stored = StoredTensor(file, 8, torch.float32, (3, 5), transposed=True)
    assert torch.equal(stored.mapped(), weight)


def test_a_file_that_is_no_safetensors_or_cut_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(100)}, file)
    stored, whole = read_header(file), file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(SafetensorError):
        read_header(file)
    with pytest.raises(ValueError, match="file size"):
        stored["a"].mapped()  # it was cut since
    file.write_bytes(whole.replace(b'"F32"', b'"F8_'[:4] + b'"'))
    with pytest.raises((SafetensorError, UnknownType)):
        read_header(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_wherever_they_are(dtype, value):
    for place in (0, 499, 999):
        tensor = torch.randn(1000).to(dtype)
        assert is_finite(tensor)
        tensor[place] = value
        assert not is_finite(tensor)


def test_what_another_type_cannot_hold_is_not_finite_in_it():
    checks = FiniteChecks(torch.float16)
    checks.add("fits", torch.tensor([65504.0, -65504.0]))
    checks.add("nothing", torch.empty(0))
    assert checks.first_not_finite() is None
    checks.add("too large", torch.tensor([1.0, 70000.0]))
    assert checks.first_not_finite() == "too large"


@pytest.mark.parametrize("cores, threads, share", [(1, 1, 1), (2, 2, 1), (6, 4, 1), (16, 4, 4)])
def test_threads_that_load_share_out_the_cores(cores, threads, share):
    """And take none from whoever computes meanwhile, or afterwards."""
    before, seen = torch.get_num_threads(), []
    all_run = threading.Barrier(threads)

    def see(_: int) -> tuple[int, int]:
        all_run.wait()
        torch.zeros(9).sum()  # what PyTorch does before it first computes in a thread is done
        return torch.get_num_threads(), cpu.threads()

    def other() -> None:
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    torch.set_num_threads(cores)
    try:
        with Loader(CPU).pool() as pool:
            assert list(pool.map(see, range(threads))) == [(share, cores)] * threads
            other()
            seen.append(torch.get_num_threads())
        other()
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [cores] * 4


def test_pools_that_begin_at_once_do_not_take_one_anothers_share_for_all():
    before, seen = torch.get_num_threads(), []

    def load(start: threading.Barrier) -> None:
        start.wait()
        with Loader(CPU).pool() as pool:
            seen.extend(pool.map(lambda _: cpu.threads(), range(4)))

    torch.set_num_threads(6)
    try:
        for _ in range(50):
            start = threading.Barrier(8)
            loading = [threading.Thread(target=load, args=(start,)) for _ in range(8)]
            for thread in loading:
                thread.start()
            for thread in loading:
                thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [6] * 4 * 8 * 50

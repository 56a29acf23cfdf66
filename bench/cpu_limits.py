"""What a CPU can do at most: the rate at which it reads memory, and multiplies in each precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from blip2 import onnx_sessions

Run = Callable[[], object]

_SIZE = 2048  # of the matrices that are multiplied


def median_seconds(run: Run, repeats: int) -> float:
    """Median wall time of `run`, after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def memory_bandwidth() -> float:
    """Bytes a second that a sum over 1 GiB reads."""
    memory = torch.ones(1 << 28)
    return memory.nbytes / median_seconds(lambda: memory.sum(), 7)


def product_rate(precision: str) -> float:
    """Operations a second of the best product of 2048 x 2048 in "float32", "bfloat16" or "int8"."""
    runs = {"float32": _float32_runs, "bfloat16": _bfloat16_runs, "int8": _int8_runs}[precision]()
    return 2 * _SIZE**3 / min(median_seconds(run, 3) for run in runs)


def _float32_runs() -> list[Run]:
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    return [lambda: a @ b, _onnx_run("MatMul", a.numpy(), b.numpy())]


def _bfloat16_runs() -> list[Run]:
    a, b = (torch.randn(_SIZE, _SIZE).bfloat16() for _ in range(2))
    return [lambda: a @ b]


def _int8_runs() -> list[Run]:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (_SIZE, _SIZE), dtype=np.uint8)
    b = generator.integers(-64, 65, (_SIZE, _SIZE), dtype=np.int8)
    return [_onnx_run("MatMulInteger", a, b)]


def _onnx_run(operator: str, a: np.ndarray, b: np.ndarray) -> Run:
    """The product by an operator of ONNX Runtime, which has `b` beforehand."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(a.dtype)
    result = TensorProto.INT32 if operator == "MatMulInteger" else kind
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", kind, a.shape)],
        [helper.make_tensor_value_info("y", result, [len(a), b.shape[1]])],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        onnx_sessions.session_options("work"),
        providers=["CPUExecutionProvider"],
    )
    return lambda: session.run(None, {"a": a})

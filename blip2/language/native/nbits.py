"""Weights in 8 or 4 bits on a CPU, through ONNX Runtime's MatMulNBits.

The fastest of the kernels that exist for it. On two cores without AVX-512, at 10240 x 2560 and 1, 5,
8 and 40 rows, it takes 1.6, 4.1, 5.4 and 23 ms with 8 bits, 1.2, 2.4, 3.7 and 17 with 4; torch's
own kernels of int8 and int4 weights with bfloat16 inputs 2.2, 7.4, 8.8, 39 and 2.0, 7.5, 7.9, 47;
float32 weights 7.1, 26, 22 and 42.

It rounds the inputs to 8 bits too, each 128 of them with their own scale: an error of 0.65 % of a
linear's output for normally distributed inputs, where the weights' own rounding makes 0.8 % (8
bits) and 14 % (4 bits). Kept in float32 (its accuracy_level 1) they would take 106 and 7.1 ms at
one row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from blip2 import memory, onnx_sessions
from blip2.errors import Blip2Error
from blip2.language.native.linear import Linear, quantize

_BLOCKS = (128, 64, 32)  # inputs that share a scale; the channel's scale is repeated for each
_ROWS = 128  # of a weight, quantised at a time: rounding's many passes then stay in the cache
_INT8_INPUTS = 4  # MatMulNBits' accuracy_level
_SESSIONS = 8  # at most, for the linears of a model


class NBitsLinear(Linear):
    """A weight of shape out x in, 8 or 4 bits a value, kept by ONNX Runtime in its own order."""

    def __init__(self) -> None:
        """Without a session: its packer gives it one before its first use."""
        self._session = None
        self._input = self._output = ""

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> NBitsLinear:
        """As the base class, with a session and its threads for this linear alone.

        Raises:
            Blip2Error: onnx or ONNX Runtime is not installed.
        """
        packer = NBitsPacker(1)
        linear = packer.pack(weight, bias, bits)
        packer.finish()
        return linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
        y = torch.from_numpy(self._session.run([self._output], {self._input: rows})[0])
        return y.view(*x.shape[:-1], -1)

    def _serve(self, session, number: int) -> None:
        self._session, self._input, self._output = session, f"x{number}", f"y{number}"


class NBitsPacker:
    """Packs the linears of a model, many to a session. Several threads may use it at once.

    Each session has threads of its own, as many as the cores they compute on: a session for every
    linear would be thousands of them. One session for all linears would be too much of the other:
    while it is made, its weights are in memory twice, and a linear's run passes by those of the
    same session that have nothing to do, for 0.4 µs each.
    """

    def __init__(self, linears: int) -> None:
        """For a model of so many."""
        self._group = -(-linears // _SESSIONS)
        self._lock = threading.Lock()
        self._waiting: list[tuple[NBitsLinear, _Rounded]] = []

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, bits: int) -> NBitsLinear:
        """As `Linear.pack`, of a linear that can be used once `finish` was called.

        Raises:
            Blip2Error: onnx or ONNX Runtime is not installed.
        """
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise Blip2Error(
                f"INT8 and INT4 on a CPU need {error.name}",
                "install it with: pip install -r requirements.txt",
            ) from None
        linear, rounded = NBitsLinear(), _Rounded.of(weight, bias, bits)
        with self._lock:
            self._waiting.append((linear, rounded))
            # Whoever comes meanwhile waits, or more than one group would be in memory twice.
            if len(self._waiting) == self._group:
                self._open_session()
        del rounded
        memory.trim()
        return linear

    def finish(self) -> None:
        """Make the last linears ready."""
        with self._lock:
            if self._waiting:
                self._open_session()
        memory.trim()

    def _open_session(self) -> None:
        linears, rounded = zip(*self._waiting, strict=True)
        self._waiting = []
        session = _session(rounded)
        for number, linear in enumerate(linears):
            linear._serve(session, number)


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Leave the cores to ONNX Runtime's threads.

    Those of torch wait for more work actively, for milliseconds after an attention that took
    microseconds, and a decoding step would take three times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """A linear as MatMulNBits reads it."""

    channels: int
    inputs: int
    bits: int
    block: int
    data: dict[str, np.ndarray]  # packed, scales and, where it has one, bias

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int) -> _Rounded:
        parts = (quantize(rows, bits) for rows in weight.split(_ROWS))
        values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        channels, inputs = values.shape
        block = next(size for size in _BLOCKS if inputs % size == 0)
        unsigned = values.view(torch.uint8) + (1 << (bits - 1))  # modulo 256
        if bits == 4:
            unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
        packed = unsigned.reshape(channels, inputs // block, block * bits // 8)
        repeated = scales.to(weight.dtype).float()[:, None].expand(-1, inputs // block)
        data = {"packed": packed, "scales": repeated.flatten()}
        if bias is not None:
            data["bias"] = bias.float()
        arrays = {name: tensor.numpy() for name, tensor in data.items()}
        return cls(channels, inputs, bits, block, arrays)


def _session(linears: Sequence[_Rounded]):
    """A session of a MatMulNBits for each linear: number i computes yi of xi.

    An input that a run is not given has no rows, and its linear nothing to do.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    nodes, inputs, outputs, initializers, data = [], [], [], [], {}
    for number, linear in enumerate(linears):
        x, y = f"x{number}", f"y{number}"
        names = {part: f"{part}{number}" for part in linear.data}
        # Neither zero points nor an order of groups.
        bias = ["", "", names["bias"]] if "bias" in names else []
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [x, names["packed"], names["scales"], *bias],
                [y],
                domain="com.microsoft",
                K=linear.inputs,
                N=linear.channels,
                bits=linear.bits,
                block_size=linear.block,
                accuracy_level=_INT8_INPUTS,
            )
        )
        shapes = {x: linear.inputs, y: linear.channels}
        described = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"rows{number}", width])
            for name, width in shapes.items()
        )
        for values, value in zip((inputs, outputs), described, strict=True):
            values.append(value)
        initializers.append(helper.make_tensor(x, TensorProto.FLOAT, [0, linear.inputs], []))
        for part, array in linear.data.items():
            initializers.append(_described(names[part], array))
            data[names[part]] = array
    graph = helper.make_graph(nodes, "linears", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)

    options = onnx_sessions.session_options("wait")
    # Given so, the data is dropped once the kernel has its own order of it; data inside the model
    # would stay beside it.
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in data.values()]
    options.add_external_initializers(list(data), values)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _described(name: str, array: np.ndarray):
    """An initializer whose data the session is given apart."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    for key, value in {"location": name, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor

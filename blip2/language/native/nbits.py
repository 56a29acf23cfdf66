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
from collections.abc import Iterator

import numpy as np
import torch

from blip2 import memory
from blip2.errors import Blip2Error
from blip2.language.native.linear import Linear, quantize

_BLOCKS = (128, 64, 32)  # inputs that share a scale; the channel's scale is repeated for each
_ROWS = 128  # of a weight, quantised at a time: rounding's many passes then stay in the cache
_INT8_INPUTS = 4  # MatMulNBits' accuracy_level


class NBitsLinear(Linear):
    """A weight of shape out x in, 8 or 4 bits a value, kept by ONNX Runtime in its own order."""

    def __init__(self, session) -> None:
        self._session = session

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> NBitsLinear:
        """As the base class.

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
        parts = (quantize(rows, bits) for rows in weight.split(_ROWS))
        values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        session = _session(*_model(values, scales.to(weight.dtype).float(), bias, bits))
        memory.trim()
        return cls(session)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
        y = torch.from_numpy(self._session.run(None, {"x": rows})[0])
        return y.view(*x.shape[:-1], -1)


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


def _model(
    values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> tuple[bytes, dict[str, np.ndarray]]:
    """A graph of one MatMulNBits, x → y, and the data that it refers to by name."""
    from onnx import TensorProto, helper

    channels, inputs = values.shape
    block = next(size for size in _BLOCKS if inputs % size == 0)
    unsigned = values.view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    packed = unsigned.reshape(channels, inputs // block, block * bits // 8)
    repeated = scales[:, None].expand(-1, inputs // block)
    data = {"packed": packed, "scales": repeated.flatten()}
    operands = ["x", *data]
    if bias is not None:
        data["bias"] = bias.float()
        operands += ["", "", "bias"]  # neither zero points nor an order of groups
    arrays = {name: tensor.numpy() for name, tensor in data.items()}
    node = helper.make_node(
        "MatMulNBits",
        operands,
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=channels,
        bits=bits,
        block_size=block,
        accuracy_level=_INT8_INPUTS,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", channels])],
        [_described(name, array) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), arrays


def _described(name: str, array: np.ndarray):
    """An initializer whose data the session is given apart."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    for key, value in {"location": name, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _session(model: bytes, data: dict[str, np.ndarray]):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # Every linear has a pool of its own: idle ones must not spin on the cores that others need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Given so, the data is dropped once the kernel has its own order of it; data inside the model
    # would stay beside it.
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in data.values()]
    options.add_external_initializers(list(data), values)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

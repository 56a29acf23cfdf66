"""Linear layers in INT8 for ONNX, as CPUs run them.

Weights are rounded once, each output channel with its own scale; inputs as they come, each token
with its own, so that a picture's result does not depend on the others of its batch. All of it is
standard ONNX (QuantizeLinear, MatMulInteger), which ONNX Runtime fuses.

Where bfloat16 is fast PyTorch takes the weights instead, in that type: it has all the digits of 8
bits, and inputs then need not be rounded to them.

The files' weights have 8 bits. x86 without VNNI adds two products in 16 bits, which saturate, and
ONNX Runtime says nothing about it: what opens the files there brings weights to 7 bits first.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.onnx import ops

from blip2 import onnx_sessions

LARGEST_WEIGHT = 127
LARGEST_UNSATURATED = 64  # 2 · 255 · 64 just fits into 16 bits
LARGEST_INPUT = 127
ZERO = 128  # what stands for 0 in uint8, the type of inputs for which x86 has instructions


def quantize_linears(module: nn.Module) -> None:
    """Replace every linear layer in `module` by an Int8Linear of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linears(child)


class Int8Linear(nn.Module):
    """x (… x in, float32) → x · weightᵀ + bias (… x out, float32). To be exported, not to be run.

    Attributes:
        values: in x out, int8.
        scales: out, float32: a channel's weights are its values times this.
        bias: out, float32, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # A channel of zeros has scale 0; dividing by 1 instead leaves its zeros alone.
        scales = weight.abs().amax(dim=1) / LARGEST_WEIGHT
        values = weight / torch.where(scales > 0, scales, 1.0)[:, None]
        self.register_buffer("values", values.round().to(torch.int8).t().contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        step, zero = torch.tensor(1 / LARGEST_INPUT), torch.tensor(ZERO, dtype=torch.uint8)
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        inputs = ops.symbolic(
            "::QuantizeLinear",
            (x / largest, self.step, self.zero),
            dtype=torch.uint8,
            shape=x.shape,
        )
        product = ops.symbolic(
            "::MatMulInteger",
            (inputs, self.values, self.zero),
            dtype=torch.int32,
            shape=(*x.shape[:-1], self.values.shape[1]),
        )
        y = product.float() * self.scales * (largest * self.step)
        return y if self.bias is None else y + self.bias


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime computes other sums of products here than integers have."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    inputs, channels = 64, 16
    weight = np.full((inputs, channels), LARGEST_WEIGHT, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", channels])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        onnx_sessions.session_options("wait"),
        providers=["CPUExecutionProvider"],
    )
    x = np.full((4, inputs), 255, np.uint8)
    (y,) = session.run(None, {"x": x})
    return not (y == inputs * LARGEST_WEIGHT * 255).all()


def graph_of_7_bits(path: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """A graph with whose weights no sum saturates, and those weights that its data file has otherwise.

    Weights are halved, the scales of what comes of them doubled; those that have 7 bits already stay.

    Args:
        path: a graph of linear layers that were `Int8Linear`, its data file beside it.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path, load_external_data=False)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    users = {name: node for node in model.graph.node for name in node.input}
    halved: dict[str, np.ndarray] = {}
    doubled: dict[str, np.ndarray] = {}

    def values(name: str) -> np.ndarray:
        return numpy_helper.to_array(initializers[name], str(path.parent))

    for node in model.graph.node:
        if node.op_type != "MatMulInteger":
            continue
        weight = values(node.input[1])
        if max(int(weight.max()), -int(weight.min())) <= LARGEST_UNSATURATED:
            continue
        halved[node.input[1]] = (weight >> 1) + (weight & (weight >> 1) & 1)  # halves to even
        floats = users[node.output[0]]
        scaled = users[floats.output[0]]
        (scales,) = (name for name in scaled.input if name in initializers)
        doubled[scales] = 2 * values(scales)
    apart = {n for n in halved if initializers[n].data_location == onnx.TensorProto.EXTERNAL}
    for name, array in (halved | doubled).items():
        if name not in apart:
            initializers[name].CopyFrom(numpy_helper.from_array(array, name))
    return model.SerializeToString(), {name: halved[name] for name in apart}

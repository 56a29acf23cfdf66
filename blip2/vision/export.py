"""The ViT and the Q-Former as ONNX files, and the proof that the files compute the same.

float32 modules → reference outputs → modules in the export's precision → files → ONNX Runtime
on the files against the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from blip2 import artifacts
from blip2.checkpoints import Checkpoint, QFormerConfig, VisionConfig
from blip2.errors import Blip2Error
from blip2.float8 import DTYPE as FLOAT8
from blip2.float8 import MULTIPLE
from blip2.vision import float8, int8, modules
from blip2.vision.onnx_runtime import open_graph, run_graph

if TYPE_CHECKING:
    import onnx

# 17 is the first whose LayerNormalization is one node, in fp32 precision; 23 has Attention and Gelu.
OPSETS = (18, 23)
# ‖file − reference‖ / ‖reference‖ that rounding explains; anything above is a wrong file, or
# weights that the precision is too coarse for.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1.4e-2,  # a cosine of 0.9999
    FLOAT8: 1.4e-1,  # 0.99
    torch.int8: 1.4e-1,
}

Inputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a file's output is from float32 PyTorch's, for one batch size."""

    batch_size: int
    relative: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Exported:
    """A graph that was written and checked.

    Attributes:
        references: the float32 module's outputs, one for each batch it was checked with.
        differences: the file's from those.
        facts: what its sidecar says of the network, for `write_sidecar`.
    """

    references: list[torch.Tensor]
    differences: list[Difference]
    facts: dict[str, Any]


def export_vit(
    checkpoint: Checkpoint,
    pixel_values: torch.Tensor,
    dtype: torch.dtype,
    path: Path,
    opset: int = OPSETS[0],
) -> Exported:
    """Write the ViT's graph (input → output) and check it, with batches of 1 and 3.

    Args:
        checkpoint: a BLIP-2 checkpoint.
        pixel_values: 1 x 3 x S x S, the picture to check it with.
        dtype: precision of the weights, inputs and outputs; of torch.int8 the linear layers are
            dynamically quantised, all else is float32; of FLOAT8 those of most layers, all
            else is float16.
        path: the .onnx file to write.
        opset: one of OPSETS; FP8 needs the last.

    Raises:
        Blip2Error: the file disagrees with float32, or the network does not suit `dtype`.
    """
    torch.manual_seed(0)
    three = torch.cat([pixel_values, torch.randn(2, *pixel_values.shape[1:])])
    cases = [{"input": pixels.to(dtype_between(dtype))} for pixels in (pixel_values, three)]
    module = modules.load_vision_transformer(checkpoint, torch.float32)
    expected = references(module, cases)
    facts: dict[str, Any] = {"vision_config": dataclasses.asdict(VisionConfig.of(checkpoint))}
    if dtype == FLOAT8:
        facts["float8"] = narrow_layers(module, pixel_values)
    narrow(module, dtype_between(dtype) if dtype == FLOAT8 else dtype)
    write_graph(module, cases[1], "output", path, opset)
    differences = check_graph(path, cases, expected, TOLERANCE[dtype], dtype == torch.int8)
    facts["weights"] = locate_weights(module, path)
    return Exported(expected, differences, facts)


def dtype_between(vit_dtype: torch.dtype) -> torch.dtype:
    """Precision of the stages' inputs and outputs for a ViT in `vit_dtype`."""
    return {torch.int8: torch.float32, FLOAT8: torch.float16}.get(vit_dtype, vit_dtype)


def export_qformer(
    checkpoint: Checkpoint,
    query_tokens: torch.Tensor,
    image_embeds: list[torch.Tensor],
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    path: Path,
    opset: int = OPSETS[0],
) -> Exported:
    """Write the Q-Former's graph (query_tokens, image_embeds, image_atts → query_output), check it.

    Args:
        checkpoint: a BLIP-2 checkpoint.
        query_tokens: 1 x n x H_q.
        image_embeds: the ViT's outputs to check it with, each B x T x H_v.
        dtype: precision of the floating-point inputs and the output.
        compute_dtype: precision of the weights and of everything inside.
        path: the .onnx file to write.
        opset: one of OPSETS.
    """
    cases = [
        {
            "query_tokens": query_tokens.expand(len(embeds), -1, -1).to(dtype),
            "image_embeds": embeds.to(dtype),
            "image_atts": _attention_mask(*embeds.shape[:2]),
        }
        for embeds in image_embeds
    ]
    module = modules.load_qformer(checkpoint, torch.float32)
    expected = references(module, cases)
    narrow(module, compute_dtype)
    write_graph(module, cases[-1], "query_output", path, opset)
    # Whichever is coarser: it may compute in fewer bits than its inputs and output have.
    tolerance = max(TOLERANCE[dtype], TOLERANCE[compute_dtype])
    differences = check_graph(path, cases, expected, tolerance)
    config = dataclasses.asdict(QFormerConfig.of(checkpoint))
    facts = {"qformer_config": config, "weights": locate_weights(module, path)}
    return Exported(expected, differences, facts)


def narrow_layers(vit: modules.VisionTransformer, pixel_values: torch.Tensor) -> dict[str, Any]:
    """Bring the layers whose error stays below the bound to FP8, in place; say which, and how far off.

    Args:
        vit: in float32.
        pixel_values: 1 x 3 x S x S: views of it are measured with.

    Raises:
        Blip2Error: there is none, or FP8 products do not take the network's widths.
    """
    layers = vit.encoder.layers
    sizes = {size for size in layers[0].mlp.fc1.weight.shape if size % MULTIPLE}
    if sizes:
        raise Blip2Error(
            f"the ViT has linears of {min(sizes)} channels, and FP8 wants multiples of {MULTIPLE}",
            "export with --dtype float16",
        )
    errors = float8.layer_errors(vit, float8.views(pixel_values))
    suited = [index for index, error in enumerate(errors) if error <= float8.LAYER_BOUND]
    if not suited:
        raise Blip2Error(
            f"FP8 is too coarse for every layer of this ViT: each is off by {min(errors):.0%} or"
            f" more, where {float8.LAYER_BOUND:.0%} is the bound",
            "export with --dtype float16",
        )
    for index in suited:
        float8.quantise_linears(layers[index])
    kept = [index for index in range(len(layers)) if index not in suited]
    return {"layers": suited, "float16_layers": kept, "errors": errors}


def narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights in place; of torch.int8, those of linear layers. What is in FP8 stays so.

    Raises:
        Blip2Error: one is too large for `dtype`.
    """
    if dtype == torch.int8:
        int8.quantize_linears(module)
        return
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if not torch.isfinite(parameter).all():
            raise Blip2Error(
                f"{name} has weights too large for {str(dtype).removeprefix('torch.')}",
                "export with --dtype float32 --qformer_dtype float32",
            )


def _attention_mask(batch: int, tokens: int) -> torch.Tensor:
    """All ones, but for one hidden embedding in every picture after the first."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[1:, -1] = 0
    return mask


def references(module: nn.Module, cases: list[Inputs]) -> list[torch.Tensor]:
    """Run a float32 module on each case, its floating-point inputs widened to float32."""
    with torch.inference_mode():
        return [
            module(*(x.float() if x.is_floating_point() else x for x in case.values()))
            for case in cases
        ]


def write_graph(
    module: nn.Module, example: Inputs, output: str, path: Path, opset: int = OPSETS[0]
) -> None:
    """Export `module` with dynamic batch to `path` and its weights to `path`.data.

    Args:
        module: in the precision to export.
        example: inputs by graph name, in the precision to export, of a batch of at least 2 (a
            batch of 1 would be taken for a constant).
        output: name of the graph's output.
        path: the .onnx file to write.
        opset: one of OPSETS.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(example),
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in example),
            verbose=False,
        )
        try:
            program.save(path, external_data=True)
        except OSError as error:
            # It says neither which file nor, with numpy's words, why.
            reason = error.strerror or "the disk is full or fails"
            file = str(artifacts.data_path(path))
            raise OSError(error.errno or errno.EIO, reason, file) from error


@contextlib.contextmanager
def _quiet():
    """Silence the exporter's progress prints and deprecation warnings: they are not the user's."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        yield


def check_graph(
    path: Path,
    cases: list[Inputs],
    expected: list[torch.Tensor],
    tolerance: float,
    is_int8: bool = False,
) -> list[Difference]:
    """Check a written file: ONNX's own checker, then ONNX Runtime against the reference.

    Args:
        path: the .onnx file.
        cases: inputs in the file's precision.
        expected: the reference's output for each case.
        tolerance: largest relative error (Frobenius norms) to accept.
        is_int8: whether its linear layers are.

    Raises:
        Blip2Error: the file is invalid or disagrees with the reference.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    graph = open_graph(path, is_int8=is_int8, optimise=False)
    differences = []
    for case, reference in zip(cases, expected, strict=True):
        output = run_graph(graph, case)
        if output.dtype == torch.float16 and not torch.isfinite(output).all():
            raise Blip2Error(
                f"the exported {path.name} overflows float16: it yields NaN or Inf where float32 does"
                " not",
                "export with --dtype float32",
            )
        difference = _compare(output, reference)
        if not difference.relative <= tolerance:
            raise Blip2Error(
                f"the exported {path.name} disagrees with PyTorch in float32: relative error"
                f" {difference.relative:.1e} at batch {difference.batch_size}, where rounding should"
                f" cost at most {tolerance:.1e}",
                "export with a --dtype of more bits",
            )
        differences.append(difference)
    return differences


def _compare(output: torch.Tensor, reference: torch.Tensor) -> Difference:
    output, reference = output.double(), reference.double()
    return Difference(
        len(reference),
        float((output - reference).norm() / reference.norm()),
        float(torch.nn.functional.cosine_similarity(output.flatten(), reference.flatten(), dim=0)),
    )


def locate_weights(module: nn.Module, path: Path) -> dict[str, dict[str, Any]]:
    """Where in a written graph's files the module's parameters and buffers lie, by their names.

    They are found by their bytes: the exporter names as it likes what it has transposed.

    Raises:
        Blip2Error: the exporter has changed a weight.
    """
    import onnx

    content = path.read_bytes()
    data = np.memmap(artifacts.data_path(path), np.uint8, mode="r")
    places: dict[tuple[tuple[int, ...], bytes], dict[str, Any]] = {}
    for tensor in onnx.load_from_string(content).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            offset, size = int(external["offset"]), int(external["length"])
            values, file = data[offset : offset + size], artifacts.data_path(path).name
        else:  # small ones lie in the graph itself
            values, file = np.frombuffer(tensor.raw_data, np.uint8), path.name
            offset = content.find(tensor.raw_data)
        key = (tuple(tensor.dims), hashlib.sha256(values).digest())
        places.setdefault(key, {"file": file, "offset": offset})

    def place(values: torch.Tensor) -> dict[str, Any] | None:
        content = values.contiguous().view(torch.uint8).numpy()
        return places.get((tuple(values.shape), hashlib.sha256(content).digest()))

    weights = {}
    for name, parameter in module.state_dict().items():
        found, transposed = place(parameter), False
        if found is None and parameter.ndim == 2:
            found, transposed = place(parameter.T), True
        if found is None:
            raise Blip2Error(
                f"PyTorch {torch.__version__} exports {name} with other values than it has",
                "export with the version that requirements.txt names",
            )
        dtype = str(parameter.dtype).removeprefix("torch.")
        shape = list(parameter.shape)
        weights[name] = {**found, "dtype": dtype, "shape": shape, "transposed": transposed}
    return weights


def write_sidecar(path: Path, **facts: Any) -> None:
    """Describe an exported graph: its files' hashes, inputs, outputs and precision, and `facts`."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    inputs, outputs = (_describe_values(side) for side in (model.graph.input, model.graph.output))
    artifacts.write_sidecar(
        path,
        data=artifacts.describe_file(artifacts.data_path(path)),
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        dtype=next(iter(outputs.values()))["dtype"],
        inputs=inputs,
        outputs=outputs,
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
        **facts,
    )


def _describe_values(values: Iterable[onnx.ValueInfoProto]) -> dict[str, dict[str, Any]]:
    import onnx

    described = {}
    for value in values:
        tensor = value.type.tensor_type
        described[value.name] = {
            "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
            "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
        }
    return described

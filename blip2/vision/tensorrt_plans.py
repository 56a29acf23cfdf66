"""What the builder and the session of TensorRT plans share: which TensorRT, which files, sidecars.

TensorRT 10 and 11 (`tensorrt`) and TensorRT-RTX (`tensorrt_rtx`) have one API, so one code path
serves them. A plan runs only on the flavour and version that built it, and only on the GPUs it was
built for; its sidecar says which. This module imports no TensorRT until it is asked to.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from blip2 import artifacts
from blip2.errors import Blip2Error
from blip2.layout import BUILD_PLANS, QFORMER_ONNX, QFORMER_PLAN, VIT_ONNX, VIT_PLAN

STANDARD, RTX = "tensorrt", "tensorrt_rtx"
PRODUCTS = {STANDARD: "TensorRT", RTX: "TensorRT-RTX"}
INSTALL = {STANDARD: "pip install tensorrt", RTX: "pip install tensorrt-rtx"}
DTYPES = {"HALF": "float16", "FLOAT": "float32", "INT64": "int64"}  # by trt.DataType's names
# The precision comes from the ONNX file from TensorRT 10 on, and 10.1 has all the names used here;
# of RTX, 1.2 is the first whose plans can be captured in a CUDA graph.
OLDEST = {STANDARD: (10, 1), RTX: (1, 2)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the two networks: its files below --onnx_dir and --plan_dir, and its tensors."""

    label: str
    onnx_file: str
    plan_file: str
    inputs: tuple[str, ...]
    output: str


VIT = Stage(
    "ViT",
    VIT_ONNX,
    VIT_PLAN,
    ("input",),
    "output",
)
QFORMER = Stage(
    "Q-Former",
    QFORMER_ONNX,
    QFORMER_PLAN,
    ("query_tokens", "image_embeds", "image_atts"),
    "query_output",
)


def import_tensorrt(*flavours: str) -> ModuleType:
    """Import the first of `flavours` ("tensorrt", "tensorrt_rtx") that is installed.

    Raises:
        Blip2Error: none can be imported, or it is older than TensorRT 10.1 or TensorRT-RTX 1.2.
    """
    reasons = []
    for flavour in flavours:
        try:
            trt = importlib.import_module(flavour)
        except ModuleNotFoundError as error:
            if error.name != flavour:
                reasons.append(f"{flavour}: {error}")
        except (ImportError, OSError) as error:  # installed, but a library or the driver is missing
            reasons.append(f"{flavour}: {one_line(str(error))}")
        else:
            _check_release(flavour, trt)
            return trt
    products = " nor ".join(PRODUCTS[flavour] for flavour in flavours)
    installs = " or ".join(INSTALL[flavour] for flavour in flavours)
    because = f" ({'; '.join(reasons)})" if reasons else ""
    raise Blip2Error(f"no {products} can be imported{because}", f"install it with: {installs}")


def _check_release(flavour: str, trt: ModuleType) -> None:
    release = tuple(int(number) for number in re.findall(r"\d+", trt.__version__)[:2])
    if release < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        raise Blip2Error(
            f"{PRODUCTS[flavour]} {trt.__version__} is too old, {oldest} is the first that will do",
            f"upgrade with: {INSTALL[flavour]} --upgrade",
        )


def flavour_of(trt: ModuleType) -> str:
    """Which of PRODUCTS an imported module is."""
    return trt.__name__.partition(".")[0]


@functools.cache  # TensorRT keeps the first logger it is given for the life of the process
def log_of(trt: ModuleType) -> Any:
    """The one logger of this TensorRT; `log_of(trt).verbose = True` prints everything it says.

    TensorRT reports failures as False or None and text for the logger, never as an exception;
    `reason()` is that text, `errors.clear()` forgets it.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.verbose = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            if self.verbose:
                print(f"[{severity.name}] {message}", file=sys.stderr)

        def reason(self) -> str:
            """The first error: what follows it is its consequence."""
            return one_line(self.errors[0]) if self.errors else "it does not say why"

    return Log()


def one_line(text: str) -> str:
    """TensorRT's message without the places in its own sources, cut to a readable length."""
    text = re.sub(r"\s+In \w+ at \S+?:\d+|^\w+\.cpp:\d+: ", "", " ".join(text.split()))
    return text if len(text) <= 400 else text[:397] + "..."


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """A plan's sidecar. Shapes are without the batch, profiles are (min, opt, max) batch sizes."""

    path: Path
    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    profile: tuple[int, int, int]
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    sidecar: dict[str, Any]

    @property
    def product(self) -> str:
        return f"{PRODUCTS[self.flavour]} {self.version}"


def read_plan_sidecar(plan_dir: Path, stage: Stage) -> PlanFacts:
    """What the sidecar says of a stage's plan, once the plan is there in its full size.

    Raises:
        Blip2Error: plan or sidecar missing, truncated, or not of this stage.
    """
    path = plan_dir / stage.plan_file
    sidecar = artifacts.read_sidecar(path, BUILD_PLANS)
    with artifacts.reading_sidecar(path, BUILD_PLANS):
        tensors = sidecar["inputs"] | sidecar["outputs"]
        facts = PlanFacts(
            path,
            sidecar["tensorrt"]["flavour"],
            sidecar["tensorrt"]["version"],
            tuple(sidecar["gpu"]["compute_capabilities"]),
            tuple(sidecar["profile"][limit] for limit in ("min", "opt", "max")),
            {name: tensor["dtype"] for name, tensor in tensors.items()},
            {name: tuple(tensor["shape"][1:]) for name, tensor in tensors.items()},
            sidecar,
        )
        names = (tuple(sidecar["inputs"]), tuple(sidecar["outputs"]))
        sizes = [*facts.profile, *(size for shape in facts.shapes.values() for size in shape)]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"sizes are {sizes}")
        if not set(facts.dtypes.values()) <= set(DTYPES.values()):
            raise ValueError(f"types are {facts.dtypes}")
    if facts.flavour not in list(PRODUCTS):
        raise Blip2Error(
            f"{path} was built with {facts.flavour!r}, which this suite does not know",
            f"make it again with: {BUILD_PLANS}",
        )
    if (set(names[0]), names[1]) != (set(stage.inputs), (stage.output,)):
        raise Blip2Error(
            f"{path} is not a plan of the {stage.label}: it takes {', '.join(names[0])} and gives"
            f" {', '.join(names[1])}",
            f"make it again with: {BUILD_PLANS}",
        )
    return facts

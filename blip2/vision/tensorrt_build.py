"""Build a TensorRT plan from an exported graph, on whichever TensorRT is installed.

ONNX file → network → profile and targets → plan and sidecar, both moved into place at the end.
The network is strongly typed: every precision is the ONNX file's, none is a builder's choice.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from blip2 import artifacts
from blip2.errors import Blip2Error
from blip2.layout import EXPORT
from blip2.vision.onnx_files import read_graph_sidecar
from blip2.vision.tensorrt_plans import (
    DTYPES,
    INSTALL,
    PRODUCTS,
    RTX,
    PlanFacts,
    Stage,
    flavour_of,
    log_of,
    read_plan_sidecar,
)

ProgressReport = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build a plan.

    Attributes:
        batch_sizes: smallest, typical (what TensorRT tunes for) and largest batch.
        workspace_gb: most GPU memory for intermediate results; None: as much as there is.
        timing_cache: file in which measured kernels are kept between builds (not RTX).
        verify: compare the graphs' weights with their hashes, which takes seconds.
        compute_capabilities: GPUs to build for, as "8.9" (RTX only); empty: this machine's, or
            without a GPU every one the builder knows from 8.0 on.
    """

    batch_sizes: tuple[int, int, int] = (1, 4, 8)
    workspace_gb: float | None = None
    timing_cache: Path | None = None
    verify: bool = True
    compute_capabilities: Sequence[str] = ()


def build_plans(
    trt: ModuleType,
    stages: Sequence[Stage],
    onnx_dir: Path,
    plan_dir: Path,
    options: BuildOptions,
    report_progress: ProgressReport = lambda _fraction, _phase: None,
) -> list[tuple[PlanFacts, float]]:
    """Build the plan of each stage; return what its sidecar says and the seconds it took.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        stages: which of the two networks.
        onnx_dir: where onnx_export.py wrote.
        plan_dir: where the plans go; what is there stays until all the new plans are whole.
        options: profile, targets, limits.
        report_progress: called with the fraction done (0 … 1) and the name of the current phase.

    Raises:
        Blip2Error: a graph is missing, damaged, not its stage's or not float16; the targets cannot
            be built for; or TensorRT refuses, with its reason.
        KeyboardInterrupt: passed on once the builder has stopped.
    """
    facts = {stage: _checked_graph(onnx_dir, stage, options) for stage in stages}
    _check_flavour(trt, options)
    gpu = _targets(trt, options.compute_capabilities)
    built = []

    files = [stage.plan_file for stage in stages]
    files += [str(artifacts.sidecar_path(Path(file))) for file in files]
    with artifacts.staging(plan_dir, files) as staged:
        for index, (stage, graph) in enumerate(facts.items()):

            def report(
                fraction: float, phase: str, stage: Stage = stage, done: int = index
            ) -> None:
                report_progress((done + fraction) / len(facts), f"{stage.label}: {phase}")

            start = time.perf_counter()
            plan = staged / stage.plan_file
            plan.parent.mkdir()
            sidecar = _build(
                *(trt, onnx_dir / stage.onnx_file, plan, gpu["compute_capabilities"]),
                *(options, report),
            )
            seconds = time.perf_counter() - start
            artifacts.write_sidecar(
                plan,
                tensorrt={"flavour": flavour_of(trt), "version": trt.__version__},
                gpu=gpu,
                **sidecar,
                onnx={key: graph[key] for key in ("file", "sha256", "data", "opset")},
                **{key: graph[key] for key in _INHERITED if key in graph},
            )
            # Read here: once published, another build may be replacing it.
            made = read_plan_sidecar(staged, stage)
            built.append((dataclasses.replace(made, path=plan_dir / stage.plan_file), seconds))
    return built


_INHERITED = ("dtype", "compute_dtype", "source", "preprocessing")


def _checked_graph(onnx_dir: Path, stage: Stage, options: BuildOptions) -> dict[str, Any]:
    """The graph's sidecar, once the files have the recorded hashes and suit the stage."""
    path = onnx_dir / stage.onnx_file
    facts = read_graph_sidecar(path)
    artifacts.Verification({path: EXPORT}, options.verify).finish()
    with artifacts.reading_sidecar(path, EXPORT):
        _check_stage(path, stage, facts)
    return facts


def _check_stage(path: Path, stage: Stage, facts: dict[str, Any]) -> None:
    if set(facts["inputs"]) != set(stage.inputs):
        raise Blip2Error(
            f"{path} is not the {stage.label}: it takes {', '.join(facts['inputs'])}",
            "make it again with: python onnx_export.py",
        )
    if facts["dtype"] != "float16":
        raise Blip2Error(
            f"{path} is {facts['dtype']}, and the plan {stage.plan_file} is float16",
            "export again with: python onnx_export.py --dtype float16",
        )
    if facts.get("compute_dtype") == "float8":
        raise Blip2Error(
            f"{path} is in FP8, with scales for tokens that TensorRT has not",
            "export again with: python onnx_export.py --dtype float16",
        )
    if "opset" not in facts:
        raise LookupError("opset")


def _check_flavour(trt: ModuleType, options: BuildOptions) -> None:
    """Refuse the options that this flavour of TensorRT has not."""
    if flavour_of(trt) != RTX and options.compute_capabilities:
        raise Blip2Error(
            "--compute_capability builds for GPUs that are not here, which only TensorRT-RTX can",
            f"leave it out, or install TensorRT-RTX with: {INSTALL[RTX]}",
        )
    if flavour_of(trt) == RTX and options.timing_cache:
        raise Blip2Error(
            "--timing_cache: TensorRT-RTX measures nothing while building and keeps no such cache",
            "leave the flag out",
        )


def _targets(trt: ModuleType, wanted: Sequence[str]) -> dict[str, Any]:
    """Which GPUs to build for: `{"compute_capabilities": ["8.9", …]}`, and the name of this one.

    TensorRT tunes on the GPU that is here; TensorRT-RTX needs none.
    """
    import torch

    here = None
    if torch.cuda.is_available():
        here = "{}.{}".format(*torch.cuda.get_device_capability())
    if flavour_of(trt) != RTX:
        if here is None:
            raise Blip2Error(
                "TensorRT builds on the GPU that will run the plan, and this machine has none",
                f"TensorRT-RTX builds without: {INSTALL[RTX]}",
            )
        return {"compute_capabilities": [here], "name": torch.cuda.get_device_name()}

    known = _rtx_targets(trt)
    # 7.5 only when asked for: a plan that covers it leaves out what the newer ones can fuse.
    targets = list(wanted) or ([here] if here else [t for t in known if t != "7.5"])
    for target in targets:
        if target not in known:
            raise Blip2Error(
                f"TensorRT-RTX {trt.__version__} cannot build for compute capability {target}, only"
                f" for {', '.join(known)}",
                "name those with --compute_capability",
            )
    return {"compute_capabilities": sorted(set(targets), key=known.index)}


def _rtx_targets(trt: ModuleType) -> list[str]:
    """Compute capabilities this TensorRT-RTX builds for, oldest first: "7.5", … "12.1"."""
    numbers = sorted(int(value) for value in trt.ComputeCapability.__members__.values())
    return [f"{number // 10}.{number % 10}" for number in numbers if number >= 10]


def _build(
    trt: ModuleType,
    graph: Path,
    plan: Path,
    targets: Sequence[str],
    options: BuildOptions,
    report_progress: ProgressReport,
) -> dict[str, Any]:
    """Write the plan; return its profile, inputs and outputs for the sidecar."""
    log = log_of(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, graph)
    _let_attention_decompose(trt, network)

    config = builder.create_builder_config()
    described = _describe_network(network, options.batch_sizes)
    config.add_optimization_profile(_profile(builder, network, options.batch_sizes))
    if options.workspace_gb:
        config.set_memory_pool_limit(
            trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * (1 << 30))
        )
    if flavour_of(trt) == RTX:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            name = f"SM{target.replace('.', '')}"
            config.set_compute_capability(trt.ComputeCapability.__members__[name], index)
        # The session captures CUDA graphs, in which a plan must not allocate memory of its own.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.timing_cache:
        _load_timing_cache(config, options.timing_cache)

    serialized = _run_builder(trt, builder, network, config, report_progress)
    if serialized is None:
        raise Blip2Error(f"{PRODUCTS[flavour_of(trt)]} cannot build {graph}: {log.reason()}")
    plan.write_bytes(memoryview(serialized))
    if options.timing_cache:
        _save_timing_cache(config, options.timing_cache)
    return described


def _network_flags(trt: ModuleType) -> int:
    """STRONGLY_TYPED: bit 1 in TensorRT 10, bit 0 and always on from 11 and in RTX."""
    flag = trt.NetworkDefinitionCreationFlag
    return 1 << int(flag.STRONGLY_TYPED) if hasattr(flag, "STRONGLY_TYPED") else 0


def _parse(trt: ModuleType, network: Any, graph: Path) -> None:
    log = log_of(trt)
    parser = trt.OnnxParser(network, log)
    # From the file, not from bytes: the weights lie beside it.
    parsed = parser.parse_from_file(str(graph))
    if log.errors or not parsed:
        reason = log.reason()  # the cause; the parser's own errors only name the node it broke
    elif not network.num_outputs:  # an empty file is a valid empty graph to the parser
        reason = "it holds no network"
    else:
        return
    raise Blip2Error(
        f"{PRODUCTS[flavour_of(trt)]} cannot read {graph}: {reason}",
        "make it again with: python onnx_export.py",
    )


def _let_attention_decompose(trt: ModuleType, network: Any) -> None:
    """Let opset 23's Attention be built from several kernels where no fused one exists.

    There is none for float32 and for some head sizes, and the builder gives up without this.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # The name is absent from the first TensorRT 10, whose parser splits Attention itself.
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' only way to downcast
            layer.attention.decomposable = True


def _tensors(network: Any) -> tuple[list[Any], list[Any]]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return inputs, [network.get_output(index) for index in range(network.num_outputs)]


def _describe_network(network: Any, batch_sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Names, dtypes, shapes and profile: they can be read here without a GPU, from a plan not."""
    inputs, outputs = (
        {
            tensor.name: {
                "dtype": DTYPES[tensor.dtype.name],
                "shape": ["batch", *list(tensor.shape)[1:]],
            }
            for tensor in side
        }
        for side in _tensors(network)
    )
    profile = dict(zip(("min", "opt", "max"), batch_sizes, strict=True))
    return {"profile": profile, "inputs": inputs, "outputs": outputs}


def _profile(builder: Any, network: Any, batch_sizes: tuple[int, int, int]) -> Any:
    """One profile: every input with the batch from smallest to largest, all else fixed."""
    profile = builder.create_optimization_profile()
    for tensor in _tensors(network)[0]:
        rest = list(tensor.shape)[1:]
        low, typical, high = ([batch, *rest] for batch in batch_sizes)
        profile.set_shape(tensor.name, low, typical, high)
    return profile


def _run_builder(
    trt: ModuleType, builder: Any, network: Any, config: Any, report_progress: ProgressReport
) -> Any:
    """Build in a thread, so that Ctrl-C reaches Python and stops the builder at its next step."""
    monitor = _monitor(trt, report_progress)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            return future.result()
        except KeyboardInterrupt:
            monitor.cancelled = True
            raise


def _monitor(trt: ModuleType, report_progress: ProgressReport) -> Any:
    """TensorRT's progress monitor: phases inside phases, each of so many steps."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.phases: dict[str, list[float]] = {}  # open ones, outermost first: [done, steps]

        def phase_start(self, phase_name: str, _parent: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, num_steps]
            self.report()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases[phase_name][0] = step + 1
            self.report()
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)
            self.report()

        def report(self) -> None:
            fraction, share = 0.0, 1.0
            for done, steps in self.phases.values():
                fraction += share * min(done, steps) / steps
                share /= steps
            report_progress(min(fraction, 1.0), next(reversed(self.phases), "done"))

    return Monitor()


def _load_timing_cache(config: Any, path: Path) -> None:
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise Blip2Error(
            f"{path} is no timing cache of this TensorRT and GPU", "delete it, or name another file"
        )


def _save_timing_cache(config: Any, path: Path) -> None:
    # Whatever is there, TensorRT has read as its cache.
    with artifacts.staging(path.parent, is_ours=lambda _: True) as staged:
        (staged / path.name).write_bytes(memoryview(config.get_timing_cache().serialize()))

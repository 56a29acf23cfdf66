"""Every name of TensorRT's API that the code uses exists in TensorRT 10, in 11 and in RTX.

NVIDIA's wheels of the bindings are real, only the libraries behind them are missing on a machine
without TensorRT: nine functions that do nothing, compiled here, are enough to import them.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STANDARD = ["10.14.1.48.post1", "10.16.1.11", "11.4.0.106"]
BINDINGS = (
    Path(sys.prefix) / "tensorrt_bindings"
)  # a folder a version, as `make test` installs them

# Which class the expressions in each source file are of. What is called otherwise is not checked,
# so test_every_row_is_used and the real builds of the other tests keep this table honest.
SOURCES = {
    "tensorrt_plans.py": {},
    "tensorrt_build.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "parser": "OnnxParser",
        "profile": "IOptimizationProfile",
        "tensor": "ITensor",
        "layer": "ILayer",
        "layer.attention": "IAttention",
        "flag": "NetworkDefinitionCreationFlag",
        "config.get_timing_cache()": "ITimingCache",
    },
    "tensorrt_session.py": {
        "self._runtime": "Runtime",
        "self._engine": "ICudaEngine",
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
        "config": "IRuntimeConfig",
        "self._config": "IRuntimeConfig",
        "self.runtime_cache": "IRuntimeCache",
    },
}
# Used through subclasses, strings and getattr, where no expression shows it.
HIDDEN = {
    "ILogger.log",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
    "IProgressMonitor.phase_finish",
    "LayerType.ATTENTION_INPUT",
    "IAttentionInputLayer.attention",
    "DataType.HALF",
    "DataType.FLOAT",
    "DataType.INT64",
}
NOT_TENSORRT = {"ILayer.__class__", "ILayer.attention", "ITensor.data_ptr", "__name__"}
ONLY_RTX = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}


@functools.cache
def used() -> dict[str, int | None]:
    """What the code uses: "Class.member" or "name" → arguments it is called with, None: not called."""
    found: dict[str, int | None] = dict.fromkeys(HIDDEN)
    for source, classes in SOURCES.items():
        tree = ast.parse((ROOT / "blip2/vision" / source).read_text())
        calls = {id(node.func): len(node.args) for node in ast.walk(tree) if type(node) is ast.Call}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            if owner == "trt" or owner.startswith("trt."):
                found.setdefault(ast.unparse(node).removeprefix("trt."), None)
            elif owner in classes:
                found[f"{classes[owner]}.{node.attr}"] = calls.get(id(node))
    dunder = {name for name in found if "__members__" in name or "__init__" in name}
    return {name: found[name] for name in found if name not in NOT_TENSORRT | dunder}


LIST_API = """
import importlib, json, operator, sys
trt, known = importlib.import_module(sys.argv[1]), {}
for name in sys.argv[2:]:
    try: known[name] = operator.attrgetter(name)(trt).__doc__ or ""
    except AttributeError: pass
print(json.dumps([trt.__version__, known]))
"""


def api(module: str, path: Path | None = None, libraries: Path | None = None) -> tuple[str, dict]:
    """Version of a TensorRT module, and the documentation of each used name that it has."""
    names = [name for name in used() if name != "__version__"]
    paths = {"PYTHONPATH": str(path or ""), "LD_LIBRARY_PATH": str(libraries or "")}
    done = subprocess.run(
        [sys.executable, "-c", LIST_API, module, *names],
        capture_output=True,
        text=True,
        env={**os.environ, **paths},
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


NOTHING = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)


def compile_nothing(directory: Path, major: str) -> None:
    """The three libraries the bindings link to, as far as importing them needs."""
    source = directory / "nothing.c"
    source.write_text(NOTHING)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{name}"]
        subprocess.run(["gcc", *options, "-o", directory / name, source], check=True)


def check(known: dict[str, str], absent: set[str]) -> None:
    """Every used name is there, and its methods take as many arguments as they are given."""
    names = set(used()) - {"__version__"}
    assert names - set(known) == absent
    for name in names - absent:
        if used()[name] is not None:
            assert takes(known[name], name.split(".")[-1], used()[name]), f"{name}\n{known[name]}"


def takes(documentation: str, method: str, arguments: int) -> bool:
    """Whether some signature in a pybind11 docstring takes that many arguments."""
    for signature in re.findall(rf"\b{method}\((self: .*)\) -> ", documentation):
        parameters = re.split(r", (?=\w+: )", signature)[1:]
        required = [parameter for parameter in parameters if " = " not in parameter]
        if len(required) <= arguments <= len(parameters):
            return True
    return False


@pytest.mark.parametrize("version", STANDARD)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles stand-ins for libraries with gcc")
def test_standard_tensorrt_has_what_the_code_uses(version, tmp_path):
    path = BINDINGS / version
    if not path.is_dir():
        pytest.skip(
            f"no bindings: pip install --no-deps --target {path} tensorrt_cu13_bindings=={version}"
        )
    compile_nothing(tmp_path, version.split(".")[0])
    found, known = api("tensorrt_bindings", path, tmp_path)
    assert found == version
    check(known, absent=ONLY_RTX)


def test_rtx_has_what_the_code_uses():
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    _, known = api("tensorrt_rtx")
    check(known, absent=set())


def test_every_row_is_used():
    classes = {name.split(".")[0] for name in used()}
    assert {name for rows in SOURCES.values() for name in rows.values()} <= classes
    assert set(used()) >= ONLY_RTX
    assert len(used()) > 50

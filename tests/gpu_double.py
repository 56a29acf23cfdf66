"""A GPU that runs on the CPU: Triton's kernels in its interpreter, those in CUDA C++ as PyTorch.

What the product launches, and with what, is its own; doubles of the kernels are in
kernel_doubles.py. Whether the kernels themselves are right only a GPU says: tests/gpu.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_doubles
import pytest
import torch
import triton
import triton.experimental.gluon  # else the first launch does, when the language is replaced
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction


def install(patch: pytest.MonkeyPatch) -> None:
    """Let the product find an H100, on which tensors are on the CPU."""
    from blip2.gpu import compiled, cuda_graphs, float8_kernels
    from blip2.language.native import beam_kernels, fused_step, kernels
    from blip2.vision import kernels as vision_kernels

    interpret(patch, beam_kernels, float8_kernels, kernels, vision_kernels)
    for module in (compiled, fused_step):
        patch.setattr(module, "load_kernel", load_kernel)
    patch.setattr(cuda_graphs, "capture", lambda launch, _pool=None: launch)
    patch.setattr(torch.cuda, "get_device_properties", lambda _device: kernel_doubles.PROPERTIES)
    patch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))


def interpret(patch: pytest.MonkeyPatch, *modules: types.ModuleType) -> None:
    """Have these modules' Triton kernels interpreted, and what of Triton's own they are made of.

    Triton has one setting for that, TRITON_INTERPRET, which it reads as it decorates a kernel: it
    would be the whole process's.
    """
    for module in (tl, tl.standard, *modules):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                patch.setattr(module, name, _interpreted(value.fn))
            elif name in ("gdc_wait", "gdc_launch_dependents"):  # an instruction of GPUs
                patch.setattr(module, name, lambda: None)
    convert = functools.partial(convert_float, interpreter._convert_float)
    patch.setattr(interpreter, "_convert_float", convert)


def convert_float(convert: Callable[..., Any], values: Any, source: Any, target: Any, mode: Any):
    """The interpreter's conversion, which rounds 15.9 to 8 in E4M3, where no carry is in its sum."""
    if (source, target) != (tl.float32, tl.float8e4nv):
        return convert(values, source, target, mode)
    # As GPUs do it: to the nearest even, what is too large to the largest.
    rounded = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


# One for each function: Triton's interpreter tells sums from maxima by what combines them.
_interpreted = functools.cache(InterpretedFunction)


def count_launches(patch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often a kernel of each .cu file is launched from now on, in numbers that grow."""
    launched: collections.Counter[str] = collections.Counter()

    def load_counted(path: Path, name: str, macros: tuple[tuple[str, int], ...]):
        launched[path.name] += 1
        return load_kernel(path, name, macros)

    patch.setattr("blip2.gpu.compiled.load_kernel", load_counted)
    return launched


def load_kernel(path: Path, _name: str, macros: tuple[tuple[str, int], ...]) -> Callable[..., None]:
    """A double of the kernel in a .cu file."""
    return functools.partial(kernel_doubles.DOUBLES[path.name], dict(macros))

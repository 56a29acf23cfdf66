"""Compile every Triton kernel that a BLIP-2 of the real widths launches, without its GPU.

    python tests/triton_compile.py 90     # compute capability 9.0

Prints a line a kernel: its name and the bytes of shared memory that it needs.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from blip2.checkpoints import QFormerConfig, VisionConfig
from blip2.gpu import compiled, float8, float8_kernels, kernel_launch
from blip2.vision import cuda, kernels, modules
from blip2.vision.float8 import quantise_linears


class Driver:
    """As much of one as compiling takes."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_launch(*arguments, **options) -> None:
            compiled = self._kernel.warmup(*arguments, grid=grid, **options)
            print(self._kernel.__name__, compiled.metadata.shared)

        return compile_launch


def prepare(capability: int, *modules: ModuleType) -> dict[str, bool]:
    """Have modules' kernels compiled where they would be launched; return the launches' options."""
    triton.runtime.driver.set_active(Driver(capability))
    for module in modules:
        for name in dir(module):
            if name.endswith("_kernel"):
                setattr(module, name, Compiled(getattr(module, name)))
    return {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}


def main(capability: int) -> None:
    options = prepare(capability, kernels, float8_kernels)
    kernel_launch._dependent_options = lambda _device: options
    products = torch.float16 if capability == 90 else torch.bfloat16
    float8.product_dtype = lambda _device: products
    gpu = SimpleNamespace(
        major=capability // 10, multi_processor_count=132, shared_memory_per_block_optin=227 << 10
    )
    torch.cuda.get_device_properties = lambda _device: gpu
    # Kernels in CUDA C++ are compiled by tests of their own.
    compiled.load_kernel = lambda *_source: lambda *_arguments, **_options: None
    with torch.device("meta"):
        vit = modules.VisionTransformer(VisionConfig(num_hidden_layers=1)).half()
        for images in (1, 16):
            pixel_values = torch.empty(images, 3, 224, 224, dtype=torch.float16)
            cuda.CudaVisionTransformer(vit)(pixel_values)
        if capability >= 89:
            quantise_linears(vit.encoder)
            for images in (1, 16):
                pixel_values = torch.empty(images, 3, 224, 224, dtype=torch.float16)
                cuda.CudaVisionTransformer(vit)(pixel_values)
    qformer = modules.QFormer(QFormerConfig(num_hidden_layers=2), 2560)
    for parameter in qformer.parameters():
        parameter.data.zero_()
    fast = cuda.CudaQFormer(qformer, torch.zeros(1, 32, 768))
    for images in (1, 3):
        fast(torch.zeros(images, 257, 1408))


if __name__ == "__main__":
    main(int(sys.argv[1]))

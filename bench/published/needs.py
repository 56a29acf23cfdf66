"""What the published checkpoint takes here: disk, memory and minutes, known from its config.json."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.published import PRECISIONS
from blip2 import memory
from blip2.checkpoints import Checkpoint, OPTConfig, QFormerConfig, VisionConfig
from blip2.errors import Blip2Error

_OPT_BYTES = {"float16": 2.0, "int8": 1.1, "int4": 0.65}  # a weight in memory; the head has 8 bits
_SLACK = 1e9  # bytes: PyTorch, activations, what the system wants
_NETWORK = 100e6 / 8  # bytes a second, for the estimate of a download
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of weights, and the tokens that the ViT makes of a picture."""

    vit: int
    qformer: int
    opt: int
    tokens: int

    @classmethod
    def of(cls, config: Mapping[str, Any], directory: Path) -> Sizes:
        """Of a BLIP-2's config.json; biases and norms, a thousandth, are left out.

        Raises:
            Blip2Error: it is no BLIP-2's.
        """
        checkpoint = Checkpoint(directory, dict(config), {}, opt_location=directory)
        vision, text = VisionConfig.of(checkpoint), OPTConfig.of(checkpoint)
        qformer = QFormerConfig.of(checkpoint)
        width, h = vision.hidden_size, qformer.hidden_size
        vit = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
        vit += (3 * vision.patch_size**2 + vision.num_tokens) * width
        crossing = qformer.num_hidden_layers // qformer.cross_attention_frequency
        layers = qformer.num_hidden_layers * (4 * h**2 + 2 * h * qformer.intermediate_size)
        layers += crossing * (2 * h**2 + 2 * h * width) + h * text.hidden_size
        opt = text.num_hidden_layers * (
            4 * text.hidden_size**2 + 2 * text.hidden_size * text.ffn_dim
        )
        opt += (text.vocab_size + text.max_position_embeddings) * text.hidden_size
        return cls(vit, layers, opt, vision.num_tokens)

    @property
    def all(self) -> int:
        """All weights."""
        return self.vit + self.qformer + self.opt


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is free here, in bytes, and how fast it is; None where the system does not say."""

    memory: float | None
    gpu_memory: float | None
    flops: float
    bandwidth: float

    @classmethod
    def here(cls) -> Machine:
        """Measured in a second."""
        import torch

        on_gpu = torch.cuda.is_available()
        flops, bandwidth = _speed(on_gpu)
        memory.release()  # what a GPU has is for the steps
        gpu_memory = float(torch.cuda.mem_get_info()[0]) if on_gpu else None
        return cls(free_memory(), gpu_memory, flops, bandwidth)


def _speed(on_gpu: bool) -> tuple[float, float]:
    """Operations a second of a product of large matrices, and bytes a second of a copy."""
    import torch

    device = "cuda" if on_gpu else "cpu"
    kind, size = (torch.float16, 4096) if on_gpu else (torch.float32, 1024)
    x = torch.ones(size, size, dtype=kind, device=device)
    source = torch.ones(128 << 20, dtype=torch.uint8, device=device)
    target = source.clone()
    flops = 2 * size**3 / _seconds(lambda: x @ x, on_gpu)
    return flops, 2 * source.numel() / _seconds(lambda: target.copy_(source), on_gpu)


def _seconds(work: Any, on_gpu: bool) -> float:
    import torch

    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def free_memory() -> float | None:
    """Bytes that new processes may have: what the system has free, within its group's limit."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        found.append(1024.0 * int(fields["MemAvailable"].split()[0]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            cache = dict(
                line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
            )
            found.append(float(limit) - used + int(cache.get("file", 0)))
    except (OSError, ValueError, KeyError):
        pass
    if not found and hasattr(os, "sysconf") and sys.platform != "win32":
        found.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return min(found, default=None)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes and seconds, by what they are for."""

    whole: float  # bytes of all weights in float32, as transformers has them
    disk: Mapping[str, float]
    memory: Mapping[str, float]
    gpu_memory: Mapping[str, float]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, sizes: Sizes, machine: Machine, download: int, asked: int, tokens: int) -> Needs:
        """What is needed to ask `asked` questions twice, greedily and with 5 beams.

        Args:
            sizes: of the checkpoint.
            machine: what it runs on.
            download: bytes that are not here yet.
            asked: questions.
            tokens: of the longest answer.
        """
        on_gpu = machine.gpu_memory is not None
        look = 2 * sizes.tokens * (sizes.vit + sizes.qformer) / machine.flops
        # Five beams of a CPU take some 3.3 times one row in transformers, which reaches 60 % of the
        # bandwidth there, and 1.5 times here.
        step = sizes.opt / machine.bandwidth
        ours = asked * (look + tokens * 2 * step * (2.2 if on_gpu else 2.5))
        theirs = asked * (2 * look + tokens * 4 * step * (2.2 if on_gpu else 4.3 / 0.6))
        reading = 4e-9 * sizes.all  # seconds, at some 500 MB a second
        packing = 0.0 if on_gpu else 10e-9 * sizes.opt  # of the weights, whenever OPT is opened
        export = 0.15e-6 * sizes.vit + 15
        seconds = {
            "download": download / _NETWORK,
            "transformers": reading + theirs * (4 if on_gpu else 1) + 30,
            "export": export,
            **dict.fromkeys(PRECISIONS, 3 * reading + 2 * packing + 2 * ours + 30),
            "the checkpoint, the ViT in 8 bits": 2 * reading + packing + export,
        }
        rest = 4 * (sizes.vit + sizes.qformer) + _SLACK
        host = {p: bytes_ * sizes.opt + rest for p, bytes_ in _OPT_BYTES.items()}
        gpu = {p: bytes_ * sizes.opt + rest / 2 for p, bytes_ in _OPT_BYTES.items()}
        whole = 4 * sizes.all + _SLACK
        return cls(
            whole,
            {
                "download": download,
                "exported ViT and Q-Former": 2 * (2 * sizes.vit + 4 * sizes.qformer),
                "converted OPT": 2 * sizes.opt,  # one at a time
            },
            {"export": 4.2 * (sizes.vit + sizes.qformer) + 0.5e9}
            | (dict.fromkeys(PRECISIONS, 3 * _SLACK) if on_gpu else host)
            | {"transformers": whole},
            gpu if on_gpu else {},
            seconds,
        )

    def lacks(self, what: str, machine: Machine) -> str | None:
        """What there is too little of for a step; None where it fits, or nobody can say."""
        for name, wanted, free in (
            ("memory", self.memory.get(what), machine.memory),
            ("GPU memory", self.gpu_memory.get(what), machine.gpu_memory),
        ):
            if wanted and free is not None and wanted > free:
                return f"needs {wanted / GB:.1f} GB of {name}, {free / GB:.1f} are free"
        return None

    def reference_device(self, machine: Machine) -> str | None:
        """Where transformers in float32 fits: "cuda", "cpu", or None."""
        if self.lacks("transformers", machine):
            return None
        return "cuda" if (machine.gpu_memory or 0.0) >= self.whole else "cpu"

    def table(self, machine: Machine) -> str:
        """For the user, before anything is done."""
        lines = [f"disk: {_sum(self.disk, 'GB')}"]
        for name, wanted, free in (
            ("memory", self.memory, machine.memory),
            ("GPU memory", self.gpu_memory, machine.gpu_memory),
        ):
            if wanted:
                most = max(wanted, key=wanted.get)
                have = "" if free is None else f"; {free / GB:.1f} GB are free"
                parts = ", ".join(f"{what} {size / GB:.1f}" for what, size in wanted.items())
                lines.append(f"{name}: at most {wanted[most] / GB:.1f} GB ({parts}){have}")
        lines.append(f"time: about {_sum(self.seconds, 'minutes')}")
        return "\n".join(lines)

    def check(self, machine: Machine, directory: Path, cache: Path) -> None:
        """See that there is enough to begin with.

        Args:
            machine: what it runs on.
            directory: where files are written.
            cache: where downloads are.

        Raises:
            Blip2Error: too little disk, or memory for not even one precision.
        """
        wanted: dict[Path, float] = {}
        for what, size in self.disk.items():
            place = _existing(cache if what == "download" else directory)
            same = next((p for p in wanted if p.stat().st_dev == place.stat().st_dev), place)
            wanted[same] = wanted.get(same, 0.0) + size
        for place, size in wanted.items():
            free = shutil.disk_usage(place).free
            if size > free:
                raise Blip2Error(
                    f"{size / GB:.1f} GB of disk are needed at {place},"
                    f" {free / GB:.1f} are free ({_sum(self.disk, 'GB')})",
                    "free some, or name another `directory` (and $HF_HOME for the download)",
                )
        lacking = self.lacks("export", machine)
        smallest = self.lacks("int4", machine)
        if lacking or smallest:
            what, lack = ("the export", lacking) if lacking else ("even OPT in int4", smallest)
            raise Blip2Error(f"{what} {lack}", "close other programs, or take a larger machine")


def _existing(place: Path) -> Path:
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _sum(parts: Mapping[str, float], unit: str) -> str:
    scale = GB if unit == "GB" else 60
    listed = ", ".join(f"{what} {value / scale:.1f}" for what, value in parts.items() if value)
    return f"{sum(parts.values()) / scale:.1f} {unit} ({listed})"

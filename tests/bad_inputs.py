"""What tests of bad inputs share: a workspace to spoil, and the programs run inside this process."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from blip2 import artifacts

VIT = Path("onnx/visual_encoder/visual_encoder.onnx")
VIT_DATA = VIT.with_name(VIT.name + ".data")
QFORMER = Path("onnx/Qformer/Qformer.onnx")
OPT = Path("opt/rank0.safetensors")
WEIGHTS = Path("checkpoint/model.safetensors")


@dataclasses.dataclass(frozen=True)
class Done:
    """What a program left: exit code, what it printed, and what it said."""

    code: int
    out: str
    err: str


def run_here(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Done:
    """Run `run.py --flag value …`, as typed in a shell, in this process and directory."""
    script, *rest = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return Done(end.value.code, *capsys.readouterr())


def snapshot(directory: Path) -> dict[bytes, bytes | None]:
    """Every file below, with its content; None for what is no file, or must not be read."""
    readable = lambda path: path.is_file() and os.access(path, os.R_OK)  # noqa: E731
    return {
        os.fsencode(path.relative_to(directory)): path.read_bytes() if readable(path) else None
        for path in sorted(directory.rglob("*"))
    }


def assert_one_line(done: Done) -> None:
    """A refusal: exit code 2, nothing printed, one line of explanation."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.err.isascii() or "\\u" not in done.err


# --- what is done to files -------------------------------------------------------------------


def remove(*paths: str | Path) -> Callable[[], None]:
    def spoil() -> None:
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def write(path: str | Path, content: bytes | str) -> Callable[[], None]:
    data = content.encode() if isinstance(content, str) else content

    def spoil() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    return spoil


def truncate(path: str | Path, by: int = 1) -> Callable[[], None]:
    return lambda: os.truncate(path, Path(path).stat().st_size - by)


def flip(path: str | Path, at: int = -9) -> Callable[[], None]:
    """Change one bit."""

    def spoil() -> None:
        content = bytearray(Path(path).read_bytes())
        content[at] ^= 1
        Path(path).write_bytes(content)

    return spoil


def edit(path: str | Path, *keys: str, to: object) -> Callable[[], None]:
    """Change one value of a JSON file."""

    def spoil() -> None:
        facts = json.loads(Path(path).read_text())
        inner = facts
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        Path(path).write_text(json.dumps(facts))

    return spoil


def swap(first: str | Path, second: str | Path) -> Callable[[], None]:
    def spoil() -> None:
        between = Path("between")
        os.rename(first, between)
        os.rename(second, first)
        os.rename(between, second)

    return spoil


def pickled(path: str | Path, content: object) -> Callable[[], None]:
    """A file of torch.save, described by a sidecar that fits it where it had one."""

    def spoil() -> None:
        torch.save(content, path)
        redescribe(Path(path))

    return spoil


def tensors(path: str | Path, change: Callable[[dict], None]) -> Callable[[], None]:
    """Change a safetensors file, and its sidecar with it, so that only the content can tell."""

    def spoil() -> None:
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})
        redescribe(Path(path))

    return spoil


def redescribe(path: Path) -> None:
    sidecar = artifacts.sidecar_path(path)
    if sidecar.is_file():
        facts = json.loads(sidecar.read_text()) | artifacts.describe_file(path)
        sidecar.write_text(json.dumps(facts))


def both(*spoilers: Callable[[], None]) -> Callable[[], None]:
    def spoil() -> None:
        for one in spoilers:
            one()

    return spoil


class Payload:
    """Touches the file "owned" if it is ever unpickled by something that runs code."""

    def __reduce__(self):
        return Path.touch, (Path("owned"),)


# --- pictures ----------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def broken_chunk() -> bytes:
    png = encoded(noise(size=(400, 300)), "PNG")
    second = png.index(b"IDAT", png.index(b"IDAT") + 4)
    return png[:second] + bytes(4) + png[second + 4 :]


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Content by name, with what is said of it."""
    jpeg, png = encoded(noise(size=(400, 300)), "JPEG"), encoded(noise(size=(400, 300)), "PNG")
    return {
        "empty.jpg": (b"", "is empty; replace"),
        "text.jpg": (b"not a picture at all", "is no picture that can be read; give one of BMP"),
        "page.png": (b"<!doctype html><title>404</title>", "is no picture that can be read"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "is damaged: image file is truncated"),
        "half.png": (png[: len(png) // 2], "is damaged: image file is truncated"),
        "chunk.png": (broken_chunk(), "is damaged: broken PNG file"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "is no picture that can be read"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture that can"),
        "paper.pdf": (b"%PDF-1.7\n%%EOF", "is no picture that can be read"),
        "bomb.png": (
            encoded(Image.new("1", (10_000, 9_000)), "PNG"),
            "has 10000 x 9000 pixels, more than 89478485; scale it down",
        ),
        "huge.png": (encoded(Image.new("1", (14_000, 13_500)), "PNG"), "has more than 89478485"),
    }


def odd_pictures() -> dict[str, bytes]:
    """Pictures that must be taken."""
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    gray16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    return {
        "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
        "gray16.png": encoded(gray16, "PNG"),
        "float.tiff": encoded(noise("F"), "TIFF"),
        "palette.png": encoded(noise("P"), "PNG", transparency=3),
        "rgba.webp": encoded(noise("RGBA"), "WEBP"),
        "turned.jpg": encoded(noise(), "JPEG", exif=turned),
        "dot.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "line.png": encoded(Image.new("RGB", (1, 20_000)), "PNG"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "a b.png": encoded(noise(), "PNG"),
        "new\nline.png": encoded(noise(), "PNG"),
        "un\udcffcode.png": encoded(noise(), "PNG"),
        "猫 🐈.png": encoded(noise(), "PNG"),
    }


# --- the machine -------------------------------------------------------------------------------

_CAPABILITIES_V3 = 0x20080522
_IGNORES_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def permissions_matter() -> Iterator[None]:
    """Within, permissions bind this thread and those it starts, even if root runs the tests."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, data) == 0
    effective = data[0]
    data[0] = effective & ~_IGNORES_PERMISSIONS
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0

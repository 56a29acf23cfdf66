"""Pictures from files and URLs to pixel_values, as LAVIS and Hugging Face make them with Pillow.

For 8-bit RGB files the result equals Hugging Face's Pillow processor (BlipImageProcessorPil) bit
for bit. What plain `convert("RGB")` gets wrong is mended first: EXIF rotation is applied,
transparency is laid over white, 16-bit and float pictures are scaled instead of clipped.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from blip2 import artifacts
from blip2.artifacts import UserError
from blip2.checkpoints import Checkpoint, VisionConfig

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
MAX_DOWNLOAD_BYTES = 64 << 20
DOWNLOAD_TIMEOUT_S = 20


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint wants its pictures: sizes in pixels, mean and std of values in 0..1."""

    height: int
    width: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Preprocessing:
        """Read it from a BLIP-2 checkpoint; what its files leave out is BLIP-2's default.

        transformers 4 wrote preprocessor_config.json, transformers 5 keeps the same under
        `image_processor` in processor_config.json.

        Raises:
            UserError: the configuration asks for a step that BLIP-2's preprocessing has not.
        """
        config = _processor_config(checkpoint.directory)
        size = config.get("size") or {}
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if "shortest_edge" in size or config.get("do_center_crop"):
            raise UserError(
                f"the image processor of {checkpoint.directory} asks for shortest_edge or a centre"
                " crop, which BLIP-2 does not use; take the files of a BLIP-2 checkpoint"
            )
        side = VisionConfig.of(checkpoint).image_size
        defaults = cls(side, side)
        if (size.get("height", side), size.get("width", side)) != (side, side):
            raise UserError(
                f"the image processor of {checkpoint.directory} makes {size}, its ViT takes"
                f" {side} x {side}; take both files from one checkpoint"
            )
        return dataclasses.replace(
            defaults,
            mean=tuple(config.get("image_mean") or defaults.mean),
            std=tuple(config.get("image_std") or defaults.std),
            resample=config.get("resample") or defaults.resample,
            rescale_factor=config.get("rescale_factor") or defaults.rescale_factor,
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Preprocessing:
        """The inverse of `dataclasses.asdict` after a trip through JSON."""
        return cls(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})


def _processor_config(directory: Path) -> dict[str, Any]:
    again = "downloading the checkpoint again"
    if (directory / "preprocessor_config.json").is_file():
        return artifacts.read_json(directory / "preprocessor_config.json", again)
    if (directory / "processor_config.json").is_file():
        return artifacts.read_json(directory / "processor_config.json", again)["image_processor"]
    return {}


def load_image(source: str | Path) -> Image.Image:
    """Open, decode and normalise one picture to 8-bit RGB; `source` is a path or an http(s) URL.

    Raises:
        UserError: missing, unreadable, no picture, damaged, too large, or an unsupported format.
    """
    url = str(source).startswith(("http://", "https://"))
    return decode_image(_download(str(source)) if url else _read(Path(source)), str(source))


def decode_image(content: bytes, source: str) -> Image.Image:
    """As `load_image`, of a picture file's content; `source` names it in messages.

    Raises:
        UserError: no picture, damaged, too large, or an unsupported format.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit is stricter and an error; metadata oddities do not change the pixels.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{source} has {image.width} x {image.height} pixels, more than {MAX_PIXELS};"
                    " scale it down first"
                )
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                print(f"note: {source} is animated; only its first frame is used", file=sys.stderr)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{source} is no picture that can be read; give one of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        raise UserError(f"{source} is damaged: {error}; replace the file") from None


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"picture {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give one picture") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except ValueError as error:
        raise UserError(f"cannot read {str(path)!r}: {error}; check the path") from None
    if not content:
        raise UserError(f"{path} is empty; replace the file")
    return content


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "blip2-suite"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url}: {reason}; give a file with --image") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise UserError(f"{url} is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB; give a smaller file")
    return content


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB without losing what a person sees in the picture."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files fill 0..65535; float files 0..1 or, from other tools, 0..255.
        full_scale = 65535 if image.mode.startswith("I") else (1 if values.max() <= 1 else 255)
        scaled = np.nan_to_num(values) * (255 / full_scale)
        return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def pixel_values(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize and normalise one RGB picture: 3 x height x width, float32."""
    size = (preprocessing.width, preprocessing.height)
    resized = np.asarray(image.resize(size, resample=preprocessing.resample))
    # The same operations in the same precisions as Hugging Face, so that the bits are the same.
    rescaled = (resized.astype(np.float64) * preprocessing.rescale_factor).astype(np.float32)
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return torch.from_numpy(np.ascontiguousarray(((rescaled - mean) / std).transpose(2, 0, 1)))

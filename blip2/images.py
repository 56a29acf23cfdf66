"""Pictures from files and URLs to pixel_values, as LAVIS and Hugging Face make them with Pillow.

For 8-bit RGB files the result equals Hugging Face's Pillow processor (BlipImageProcessorPil) bit
for bit. What plain `convert("RGB")` gets wrong is mended first: EXIF rotation is applied,
transparency is laid over white, 16-bit and float pictures are scaled instead of clipped.
"""

from __future__ import annotations

import dataclasses
import io
import stat
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from blip2 import artifacts, downloads, memory
from blip2.artifacts import UserError, first_line

if TYPE_CHECKING:
    from blip2.checkpoints import Checkpoint

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
MAX_FILE_BYTES = 1 << 30  # more than so many pixels take without compression
MAX_SIDE = 4096  # of what a ViT takes


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
        # Imported here: processes that decode pictures are many, and need no torch.
        from blip2.checkpoints import VisionConfig

        side = VisionConfig.of(checkpoint).image_size
        path, config = _processor_config(checkpoint.path)
        try:
            return cls._from_config(config, side)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} describes no preprocessing that BLIP-2 uses: {error}; take it from the same"
                " checkpoint as its ViT"
            ) from None

    @classmethod
    def _from_config(cls, config: dict[str, Any], side: int) -> Preprocessing:
        size = config.get("size") or {}
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if "shortest_edge" in size or config.get("do_center_crop"):
            raise ValueError("it asks for shortest_edge or a centre crop")
        if (size.get("height", side), size.get("width", side)) != (side, side):
            raise ValueError(f"it makes {size}, the ViT takes {side} x {side}")
        defaults = cls(side, side)
        return cls(
            side,
            side,
            mean=tuple(config.get("image_mean") or defaults.mean),
            std=tuple(config.get("image_std") or defaults.std),
            resample=config.get("resample") or defaults.resample,
            rescale_factor=config.get("rescale_factor") or defaults.rescale_factor,
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Preprocessing:
        """The inverse of `dataclasses.asdict` after a trip through JSON.

        Raises:
            ValueError, TypeError, KeyError: it is not.
        """
        return cls(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})

    def __post_init__(self) -> None:
        sides = (self.height, self.width)
        statistics = (*self.mean, *self.std, self.rescale_factor)
        valid = (
            all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
            and len(self.mean) == len(self.std) == 3
            and all(isinstance(value, int | float) for value in statistics)
            # Within what leaves every pixel a number in float32; NaN is not.
            and all(abs(value) <= 1e6 for value in statistics)
            and all(value >= 1e-6 for value in self.std)
            and self.resample in list(Image.Resampling)
        )
        if not valid:
            raise ValueError(f"no preprocessing of pictures has {dataclasses.asdict(self)}")


def _processor_config(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Where the image processor is described, and how; an empty description where nowhere."""
    again = "downloading the checkpoint again"
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return path, artifacts.read_json(path, again)
    path = directory / "processor_config.json"
    if path.is_file():
        return path, artifacts.read_json(path, again).get("image_processor", {})
    return path, {}


def load_image(source: str | Path) -> Image.Image:
    """Open, decode and normalise one picture to 8-bit RGB; `source` is a path or an http(s) URL.

    Raises:
        UserError: missing, unreadable, no picture, damaged, too large, or an unsupported format.
    """
    name = str(source)
    content = downloads.download(name) if downloads.is_url(name) else _read(Path(source))
    return decode_image(content, name)


def decode_image(content: bytes, source: str) -> Image.Image:
    """As `load_image`, of a picture file's content; `source` names it in messages.

    Raises:
        UserError: no picture, damaged, too large, or an unsupported format.
    """
    try:
        with warnings.catch_warnings(), memory.needed(f"for {source}", "scale it down first"):
            # Our own limit is stricter and an error; metadata oddities do not change the pixels.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{source} has {image.width} x {image.height} pixels, more than {MAX_PIXELS};"
                    " scale it down first"
                )
            if getattr(image, "is_animated", False) and image.format != "MPO":
                print(f"note: {source} is animated; only its first frame is used", file=sys.stderr)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:  # of twice as many, before we can look
        raise UserError(
            f"{source} has more than {MAX_PIXELS} pixels; scale it down first"
        ) from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{source} is no picture that can be read; give one of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        raise UserError(f"{source} is damaged: {first_line(error)}; replace the file") from None


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
            content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"picture {path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except ValueError as error:
        raise UserError(f"cannot read {str(path)!r}: {error}; check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a directory; give one picture")
    if not stat.S_ISREG(status.st_mode):
        # A pipe may never end, nor begin.
        raise UserError(f"{path} is a pipe or a device, not a file; save the picture to a file")
    if status.st_size > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; give a smaller file")
    if not content:
        raise UserError(f"{path} is empty; replace the file")
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


def pixel_values(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and normalise one RGB picture: 3 x height x width, float32, C-contiguous."""
    size = (preprocessing.width, preprocessing.height)
    resized = np.asarray(image.resize(size, resample=preprocessing.resample))
    # The same operations in the same precisions as Hugging Face, so that the bits are the same.
    rescaled = (resized.astype(np.float64) * preprocessing.rescale_factor).astype(np.float32)
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return np.ascontiguousarray(((rescaled - mean) / std).transpose(2, 0, 1))

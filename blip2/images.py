"""Pictures from files and URLs to pixels of the ViT's size, as LAVIS and Hugging Face have them.

They travel as bytes. Rescaled and normalised they are where the ViT begins, which for a byte is a
look into a table of 256 values a channel: `Preprocessing.table`. For 8-bit RGB files the result
equals Hugging Face's Pillow processor (BlipImageProcessorPil) bit for bit. What plain
`convert("RGB")` gets wrong is mended first: EXIF rotation is applied, transparency is laid over white,
pictures of more than 8 bits are scaled instead of clipped. Metadata never makes a picture unreadable:
of it only the rotation matters, where it can be found.

Needs numpy and Pillow only: processes that decode pictures are many, and import this.
"""

from __future__ import annotations

import dataclasses
import io
import re
import stat
import struct
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from blip2 import downloads, memory
from blip2.errors import Blip2Error, first_line

if TYPE_CHECKING:
    import torch

    from blip2.checkpoints import Checkpoint

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_OPENED = (*FORMATS, "DIB")  # a BMP without its first header
SUFFIXES = tuple(
    suffix
    for suffix, name in sorted(Image.registered_extensions().items())
    if name in (*_OPENED, "MPO")  # a JPEG with further ones behind it, opened as a JPEG
)
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

        Raises:
            Blip2Error: the configuration asks for a step that BLIP-2's preprocessing has not.
        """
        from blip2.checkpoints import VisionConfig, image_processor

        path, fields = image_processor.description(checkpoint)
        try:
            return cls(**image_processor.arguments(fields, VisionConfig.of(checkpoint)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Blip2Error(
                f"{path} describes no preprocessing that BLIP-2 uses: {error}",
                "take it from the same checkpoint as its ViT",
            ) from None

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Preprocessing:
        """The inverse of `dataclasses.asdict` after a trip through JSON.

        Raises:
            ValueError, TypeError, KeyError: it is not.
        """
        return cls(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})

    def table(self) -> np.ndarray:
        """What a byte becomes in pixel_values, by channel: 3 x 256, float32."""
        # The same operations in the same precisions as Hugging Face, so that the bits are the same.
        rescaled = (np.arange(256) * float(self.rescale_factor)).astype(np.float32)
        mean, std = np.float32(self.mean), np.float32(self.std)
        return (rescaled - mean[:, None]) / std[:, None]

    def __post_init__(self) -> None:
        sides = (self.height, self.width)
        statistics = (*self.mean, *self.std, self.rescale_factor)
        valid = (
            all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
            and len(self.mean) == len(self.std) == 3
            and all(type(value) in (int, float) for value in statistics)
            # Within what leaves every pixel a number in float32; NaN is not.
            and all(abs(value) <= 1e6 for value in statistics)
            and all(value >= 1e-6 for value in self.std)
            and type(self.resample) is int
            and self.resample in list(Image.Resampling)
        )
        if not valid:
            raise ValueError(f"no preprocessing of pictures has {dataclasses.asdict(self)}")


def load_image(source: str | Path) -> Image.Image:
    """Open, decode and normalise one picture to 8-bit RGB; `source` is a path or an http(s) URL.

    Raises:
        Blip2Error: missing, unreadable, no picture, damaged, too large, or an unsupported format.
    """
    name = str(source)
    content = downloads.download(name) if downloads.is_url(name) else _read(Path(source))
    return decode_image(content, name)


def decode_image(content: bytes, source: str) -> Image.Image:
    """As `load_image`, of a picture file's content; `source` names it in messages.

    Raises:
        Blip2Error: no picture, damaged, too large, or an unsupported format.
    """
    try:
        with warnings.catch_warnings(), memory.needed(f"for {source}", "scale it down first"):
            # Our own limit is stricter and an error; metadata oddities do not change the pixels.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=_OPENED)
            if image.width * image.height > MAX_PIXELS:
                raise Blip2Error(
                    f"{source} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}",
                    "scale it down first",
                )
            # Pillow keeps the upper byte of such colours, and forgets that there was another.
            halved = any(";16" in str(tile) for tile in image.tile) and image.mode in _COLOURS
            image.load()
            if _has_more_frames(content):
                print(f"note: {source} is animated; only its first frame is used", file=sys.stderr)
            return _upright(_upper_bytes_to_full_scale(image, source) if halved else image)
    except Blip2Error:
        raise
    except Image.DecompressionBombError:  # of twice as many, before we can look
        raise Blip2Error(
            f"{source} has more than {MAX_PIXELS} pixels", "scale it down first"
        ) from None
    except Image.UnidentifiedImageError:
        raise Blip2Error(
            f"{source} is no picture that can be read", f"give one of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        raise Blip2Error(f"{source} is damaged: {first_line(error)}", "replace the file") from None


def normalise(image: Image.Image) -> Image.Image:
    """A picture of Pillow's as `load_image` would have given its file.

    Raises:
        Blip2Error: too large, or it cannot be read.
    """
    if image.width * image.height > MAX_PIXELS:
        raise Blip2Error(f"the picture has more than {MAX_PIXELS} pixels", "scale it down first")
    try:
        with memory.needed("for the picture", "scale it down first"):
            image.load()
            return _upright(image)
    except Blip2Error:
        raise
    except Exception as error:  # whatever its file's decoder raises
        raise Blip2Error(f"the picture is damaged: {first_line(error)}", "replace it") from None


def _upright(image: Image.Image) -> Image.Image:
    """RGB, turned as its metadata asks."""
    turn = _TURNS.get(_orientation(image))
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
            content = path.read_bytes()
    except FileNotFoundError:
        raise Blip2Error(f"picture {path} does not exist", "check the path") from None
    except OSError as error:
        raise Blip2Error(f"cannot read {path}: {error.strerror}", "check its permissions") from None
    except ValueError as error:
        raise Blip2Error(f"cannot read {str(path)!r}: {error}", "check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise Blip2Error(f"{path} is a directory", "give one picture")
    if not stat.S_ISREG(status.st_mode):
        # A pipe may never end, nor begin.
        raise Blip2Error(f"{path} is a pipe or a device, not a file", "save the picture to a file")
    if status.st_size > MAX_FILE_BYTES:
        raise Blip2Error(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", "give a smaller file")
    if not content:
        raise Blip2Error(f"{path} is empty", "replace the file")
    return content


def _has_more_frames(content: bytes) -> bool:
    """Whether an animation goes on; looked up apart, as what follows a picture may be damaged."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        return getattr(image, "is_animated", False) and image.format != "MPO"
    except Exception:
        return False


# What a viewer does to a picture of each orientation but 1.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int | None:
    """The orientation that the metadata tells, whatever else is wrong with it."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow parses all of it, and raises whatever comes up
        found = None
    return found if isinstance(found, int) else _find_orientation(image.info.get("exif"))


def _find_orientation(exif: object) -> int | None:
    """The orientation in EXIF's first directory, of which nothing else need make sense.

    EXIF is a TIFF: byte order, 42, where the first directory is; there a count, and entries of
    twelve bytes each: tag, type, count, value.
    """
    if not isinstance(exif, bytes):  # a text chunk of a PNG may have that name
        return None
    tiff = re.sub(rb"^(Exif\0\0)+", b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "<")
    try:
        [start] = struct.unpack_from(f"{order}I", tiff, 4)
        [count] = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == ExifTags.Base.Orientation and kind in _INTEGERS:
                return struct.unpack_from(f"{order}{_INTEGERS[kind]}", tiff, entry + 8)[0]
    except struct.error:
        pass
    return None


_INTEGERS = {1: "B", 3: "H", 4: "I"}  # TIFF's types, as struct writes them
_COLOURS = ("RGB", "RGBA", "LA")
_BITS = (8, 10, 12, 14, 16)  # that a value of 16 bits may use


def _upper_bytes_to_full_scale(image: Image.Image, source: str) -> Image.Image:
    """Brighten colours of which cameras use 10, 12 or 14 of 16 bits.

    Raises:
        Blip2Error: nothing is left of them.
    """
    bands = zip(image.getbands(), image.getextrema(), strict=True)
    highest = max(high for band, (_, high) in bands if band != "A")
    if highest == 0:
        raise Blip2Error(
            f"{source} uses at most the lowest 8 of its 16 bits a colour, and they cannot be read",
            "save it with 8 bits a colour",
        )
    white = next(white for bits in _BITS if (white := (1 << bits >> 8) - 1) >= highest)
    brighter = image.point(lambda value: min(255, value * 255 // white))
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        brighter.info["transparency"] = tuple(min(255, (v >> 8) * 255 // white) for v in key)
    return brighter


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB without losing what a person sees in the picture."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    # A text chunk of a PNG may have that name too.
    is_keyed = isinstance(image.info.get("transparency"), int | bytes | tuple)
    if not is_keyed:
        image.info.pop("transparency", None)
    if is_keyed or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits, or of floats, scaled to 0..255: height x width, uint8.

    No file says which of its values is white. Integers below zero, and floats well below, are a
    range of their own, shown from the lowest to the highest. Others begin at 0, which is black.
    """
    values = np.asarray(image, dtype=np.float64)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1:
        values = np.where(values < 0, values + (1 << 32), values)  # Pillow knows no unsigned ones
    finite = values[np.isfinite(values)]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    black, white = 0.0, _white(highest, is_float=image.mode == "F")
    if lowest < (-white / 4 if image.mode == "F" else 0):
        black, white = lowest, highest
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    grey = np.clip((values - black) * (255 / (white - black or 1)) + 0.5, 0, 255).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # there 0 is white
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _white(highest: float, is_float: bool) -> float:
    """The value that is meant as white where `highest` is the highest that there is.

    Integers use 8, 10, 12, 14 or 16 bits, whatever they are stored in. Floats go to 1, or like the
    integers; highlights and resampling exceed that.
    """
    if is_float and highest <= 16:
        return 1.0
    excess = 1.25 if is_float else 1.0
    full_scales = ((1 << bits) - 1 for bits in _BITS)
    return next((float(white) for white in full_scales if highest <= white * excess), highest)


def resized_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """One RGB picture at the ViT's size: 3 x height x width, uint8, C-contiguous."""
    size = (preprocessing.width, preprocessing.height)
    resized = np.asarray(image.resize(size, resample=preprocessing.resample))
    return np.ascontiguousarray(resized.transpose(2, 0, 1))


def pixel_values(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """One RGB picture resized, rescaled and normalised: 3 x height x width, float32."""
    import torch  # which a process that only decodes does not need

    pixels, table = resized_pixels(image, preprocessing), preprocessing.table()
    return torch.from_numpy(
        np.stack([of[channel] for of, channel in zip(table, pixels, strict=True)])
    )

"""Preprocessing against Hugging Face's Pillow processor, and every kind of picture there is."""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2 import images
from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error

PREPROCESSING = images.Preprocessing(height=224, width=224)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (31, 977), (1, 1), (3, 3), (1, 2000)])
@pytest.mark.parametrize("side", [96, 224, 364])
def test_pixel_values_equal_hugging_face_bit_for_bit(size, side):
    picture = Image.fromarray(noise(*size))
    processor = BlipImageProcessorPil(size={"height": side, "width": side})
    # Channels last is said outright: Hugging Face cannot guess it for a 3 x 3 picture.
    theirs = processor(picture, input_data_format="channels_last")["pixel_values"][0]
    ours = images.pixel_values(picture, images.Preprocessing(side, side)).numpy()
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.int32), np.asarray(theirs).view(np.int32))


@pytest.mark.parametrize("extreme", [0, 255])
def test_black_and_white_equal_hugging_face(extreme):
    picture = Image.new("RGB", (50, 40), (extreme,) * 3)
    theirs = BlipImageProcessorPil(size={"height": 224, "width": 224})(picture)["pixel_values"][0]
    assert np.array_equal(images.pixel_values(picture, PREPROCESSING), np.asarray(theirs))


USUAL = {
    "image_processor_type": "BlipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": None, "image_mean": None, "default_to_square": None},
        {"resample": 0},
        {"resample": 1},
        {"rescale_factor": 0},
        {"rescale_factor": 1, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.5},
        {"size": 28},
        {"size": [28, 28]},
        {"do_convert_rgb": False},
        {"do_center_crop": False, "crop_size": 14},
        {"do_pad": False, "pad_size": {"height": 64, "width": 64}},
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True], ids=["transformers 4", "transformers 5"])
def test_checkpoints_processors_equal_hugging_face(tiny_checkpoint, tmp_path, change, nested):
    """Under transformers 5's name it is read before transformers 4's, which then says nothing."""
    checkpoint = shutil.copytree(tiny_checkpoint.checkpoint, tmp_path / "checkpoint")
    described = USUAL | change
    if nested:
        (checkpoint / "preprocessor_config.json").write_text(
            json.dumps({"resample": 5, "size": 14})
        )
        described = {"image_processor": described}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (checkpoint / name).write_text(json.dumps(described))
    picture = Image.fromarray(noise(60, 40))
    processor = BlipImageProcessorPil.from_pretrained(checkpoint)
    theirs = processor(picture, return_tensors="pt").pixel_values[0].float()
    preprocessing = images.Preprocessing.of(open_checkpoint(checkpoint))
    assert np.array_equal(images.pixel_values(picture, preprocessing), theirs.numpy())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do_resize": False}, "it leaves pictures at their sizes, the ViT takes 28 x 28"),
        ({"do_center_crop": True}, "it asks for a step more, do_center_crop"),
        ({"do_pad": True}, "it asks for a step more, do_pad"),
        ({"size": {"shortest_edge": 28}}, "not a height and a width"),
        ({"size": {"height": 28}}, "not a height and a width"),
        ({"size": 28, "default_to_square": False}, "28 for the shorter side"),
        ({"size": 14}, "it makes 14 x 14, the ViT takes 28 x 28"),
        ({"image_processor_type": "CLIPImageProcessor"}, "it is a CLIPImageProcessor"),
        ({"do_normalize": "no"}, "do_normalize is 'no'"),
        ({"image_mean": None}, "no preprocessing of pictures has"),
        ({"size": None}, "it makes None x None"),
        ({"resample": 9}, "no preprocessing of pictures has"),
        ({"image_mean": [0.5, 0.5]}, "no preprocessing of pictures has"),
    ],
    ids=str,
)
def test_processors_that_do_more_are_refused(tiny_checkpoint, tmp_path, change, message):
    checkpoint = shutil.copytree(tiny_checkpoint.checkpoint, tmp_path / "checkpoint")
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(USUAL | change))
    with pytest.raises(Blip2Error, match=message) as error:
        images.Preprocessing.of(open_checkpoint(checkpoint))
    assert str(error.value).startswith(f"{path} describes no preprocessing that BLIP-2 uses")


def saved(tmp_path: Path, image: Image.Image, name: str, **options) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_transparency_is_laid_over_white(tmp_path):
    pixels = noise(8, 8, 4)
    pixels[..., 3] = 0
    loaded = images.load_image(saved(tmp_path, Image.fromarray(pixels, "RGBA"), "a.png"))
    assert np.asarray(loaded).min() == 255


def test_palette_with_transparency_is_laid_over_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10] + [0] * 756)
    loaded = images.load_image(saved(tmp_path, image, "a.png", transparency=1))
    assert np.asarray(loaded).min() == 255


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    loaded = images.load_image(saved(tmp_path, Image.fromarray(values), "a.png"))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_pictures_are_scaled(tmp_path):
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    loaded = images.load_image(saved(tmp_path, Image.fromarray(values), "a.tiff"))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 128, 255]


SCENE = noise(12, 9, 1)
SCENE[0, :2] = 0, 255
BITS = 0xFFFF / 255
HOLE = np.where(SCENE < 9, np.nan, SCENE / 255)
UNUSUAL = {
    "whole.png": (SCENE * BITS).astype(np.uint16),
    "twelve of 16 bits.png": (SCENE * (4095 / 255)).astype(np.uint16),
    "ten of 16 bits.tif": (SCENE * (1023 / 255)).astype(np.uint16),
    "eight of 16 bits.png": SCENE.astype(np.uint16),
    "eight of 32 bits.tif": SCENE.astype(np.int32),
    "sixteen of 32 bits.tif": (SCENE * BITS).astype(np.int32),
    "thirty-one of 32 bits.tif": SCENE * np.int32((1 << 23) + 1),
    "below zero.tif": (SCENE.astype(np.int32) * 16 - 1024),
    "to 1.tif": (SCENE / 255).astype(np.float32),
    "a little above 1.tif": (SCENE * (1.02 / 255)).astype(np.float32),
    "to 255.tif": SCENE.astype(np.float32),
    "a little above 255.tif": (SCENE * 1.02).astype(np.float32),
    "to 65535.tif": (SCENE * BITS).astype(np.float32),
    "from -1 to 1.tif": (SCENE / 127.5 - 1).astype(np.float32),
    "a hole.tif": HOLE.astype(np.float32),
    "a hole, to 255.tif": (HOLE * 255).astype(np.float32),
}


@pytest.mark.parametrize("name", list(UNUSUAL))
def test_a_picture_looks_the_same_however_its_greys_are_stored(tmp_path, name):
    loaded = images.load_image(saved(tmp_path, Image.fromarray(UNUSUAL[name]), name))
    seen, off = np.asarray(loaded)[..., 0].astype(int), 6  # a little above 1 is 2 % too bright
    assert np.array_equal(*(np.asarray(loaded)[..., band] for band in (0, 2)))
    whole = np.isfinite(UNUSUAL[name].astype(float))
    assert np.abs(seen - SCENE)[whole].max() <= off
    assert not seen[~whole].any()


def test_unsigned_32_bits_and_white_at_zero(tmp_path):
    """Pillow can read them, but not write: TIFF's tags 339 and 262 are changed in the file."""
    words = np.array([[0, 1 << 31, (1 << 32) - 1]], dtype=np.uint32).view(np.int32)
    halves = np.array([[0, 65535]], dtype=np.uint16)
    for values, tag, before, after, seen in (
        (words, TiffImagePlugin.SAMPLEFORMAT, 2, 1, [0, 128, 255]),
        (halves, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1, 0, [255, 0]),
    ):
        path = saved(tmp_path, Image.fromarray(values), "a.tif")
        entry = struct.pack("<HHIH", tag, 3, 1, before)
        assert path.read_bytes().count(entry) == 1
        path.write_bytes(path.read_bytes().replace(entry, entry[:-2] + struct.pack("<H", after)))
        assert np.asarray(images.load_image(path))[0, :, 0].tolist() == seen


def png_of_16_bits(values: np.ndarray, *more: tuple[bytes, bytes]) -> bytes:
    """An RGB PNG of height x width x 3 values, which Pillow cannot write; `more` chunks."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_colours_of_some_of_16_bits(bits):
    colours = noise(12, 9)
    content = png_of_16_bits(colours * (((1 << bits) - 1) / 255))
    seen = np.asarray(images.decode_image(content, "a.png"))
    step = 255 / ((1 << bits >> 8) - 1)  # Pillow keeps the upper 8 of the 16
    assert np.abs(seen.astype(int) - colours).max() <= step


def test_colours_of_which_nothing_can_be_read_are_refused():
    with pytest.raises(Blip2Error, match=r"a\.png uses at most the lowest 8 of its 16 bits"):
        images.decode_image(png_of_16_bits(noise(12, 9)), "a.png")


def test_the_transparent_colour_of_16_bits_is_laid_over_white(tmp_path):
    values = np.array([[[0x1234, 0x5678, 0x9ABC], [0xFFFF, 0, 0]]])
    content = png_of_16_bits(values, (b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)))
    assert np.asarray(images.decode_image(content, "a.png"))[0].tolist() == [[255] * 3, [255, 0, 0]]
    grey = Image.fromarray(np.array([[0, 65535, 777]], dtype=np.uint16))
    loaded = images.load_image(saved(tmp_path, grey, "g.png", transparency=777))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 255, 255]


def test_lab_colours_become_those_of_a_screen(tmp_path):
    """L 53, a 80, b 67 is sRGB's red, and so on: CIE's definition. TIFF has 255 as the highest L."""
    lab = np.array([[[136, 80, 67], [224, -86, 83], [255, 0, 0]]]).astype(np.int8)
    image = Image.frombytes("LAB", (3, 1), lab.tobytes())
    seen = np.asarray(images.load_image(saved(tmp_path, image, "a.tif"))).astype(int)[0]
    assert np.abs(seen - [[255, 0, 0], [0, 255, 0], [255, 255, 255]]).max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_exif_rotation_is_applied(tmp_path, orientation, name):
    image = Image.fromarray(noise(20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, name, exif=exif, lossless=True)
    loaded = np.asarray(images.load_image(path))
    assert np.array_equal(loaded, np.asarray(ImageOps.exif_transpose(Image.open(path))))
    if orientation == 6:  # stored lying on its side: turned clockwise
        assert np.array_equal(loaded, np.rot90(np.asarray(image), -1))


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF of entries (tag, type, count, value or offset), sorted or not, right or wrong."""
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    packed = [struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries]
    directory = struct.pack(f"{order}H", len(packed)) + b"".join(packed) + bytes(4)
    return b"Exif\0\0" + header + directory + struct.pack("<ii", -1, 0)


TURNED, TURNED_MOTOROLA = (0x112, 3, 1, b"\6\0\0\0"), (0x112, 3, 1, b"\0\6\0\0")
METADATA = {
    # name: EXIF, and whether a picture of it lies on its side
    "a rational over 0": (exif(TURNED, (0x11A, 10, 1, struct.pack("<I", 38))), True),
    "a long maker's name": (exif((0x10F, 2, 999, b"\xff" * 4), TURNED), True),
    "a maker's name beyond the end": (exif((0x10F, 2, 9, b"\xff" * 4), TURNED), True),
    "another order": (exif((0x10F, 2, 9, b"\xff" * 4), TURNED_MOTOROLA, order=">"), True),
    "cut off behind it": (exif(TURNED)[:30], True),
    "cut off in it": (exif(TURNED)[:24], False),
    "a text for an orientation": (exif((0x112, 2, 2, b"6\0\0\0")), False),
    "an orientation of 9": (exif((0x112, 3, 1, b"\x09\0\0\0")), False),
    "entries without end": (exif(TURNED).replace(b"\x08\0\0\0\1\0", b"\x08\0\0\0\xff\xff"), True),
    "a directory that is itself": (exif((0x8769, 4, 1, struct.pack("<I", 8)), TURNED), True),
    "garbage": (b"Exif\0\0" + b"\xff" * 40, False),
    "nothing": (b"Exif\0\0", False),
}


@pytest.mark.parametrize("name", list(METADATA))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_no_pixels(tmp_path, name, kind):
    metadata, turned = METADATA[name]
    image = Image.fromarray(noise(20, 10))
    path = saved(tmp_path, image, "a", format=kind, exif=metadata, lossless=True)
    expected = np.asarray(Image.open(path).convert("RGB"))
    expected = np.rot90(expected, -1) if turned else expected
    assert np.array_equal(np.asarray(images.load_image(path)), expected)


@pytest.mark.parametrize(
    "key", ["exif", "transparency", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "gamma"]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
def test_a_text_in_a_png_is_a_text_whatever_its_name(tmp_path, key, mode):
    text = PngImagePlugin.PngInfo()
    text.add_text(key, "b'Exif\\x00\\x00MM\\x00*'")
    image = Image.fromarray(noise(6, 4, 1).astype(np.uint16) * 257)
    image = image if mode == "I;16" else Image.fromarray(noise(6, 4, 1)).convert(mode)
    plain = images.load_image(saved(tmp_path, image, "plain.png"))
    loaded = images.load_image(saved(tmp_path, image, "text.png", pnginfo=text))
    assert np.array_equal(np.asarray(loaded), np.asarray(plain))


def test_what_follows_the_first_frame_may_be_damaged(tmp_path):
    frames = [Image.fromarray(noise(40, 40, 1, seed)) for seed in range(2)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    whole, content = np.asarray(images.load_image(path)), path.read_bytes()
    for cut in range(1, len(content) // 2 - 100, 97):
        path.write_bytes(content[:-cut])
        assert np.array_equal(np.asarray(images.load_image(path)), whole)


def test_first_frame_of_an_animation_is_used_and_said(tmp_path, capsys):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert images.load_image(path).getpixel((0, 0)) == (255, 0, 0)
    assert "animated" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    gray = Image.new("L", (6, 5), 128)
    converted = np.asarray(images.to_rgb(gray.convert(mode)))
    assert converted.shape == (5, 6, 3)
    if mode in ("L", "LA", "P", "CMYK", "YCbCr", "HSV"):
        assert np.abs(converted.astype(int) - 128).max() <= 1


def damaged_files() -> dict[str, bytes]:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "JPEG")
    png = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(png, "PNG")
    broken_chunk = bytearray(png.getvalue())
    broken_chunk[40:48] = b"\0" * 8
    return {
        "empty.jpg": b"",
        "text.jpg": b"<html>not found</html>",
        "half.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "half.png": png.getvalue()[: len(png.getvalue()) // 2],
        "chunk.png": bytes(broken_chunk),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "page.pdf": b"%PDF-1.7\n",
    }


@pytest.mark.parametrize("name", list(damaged_files()))
def test_damaged_files_are_one_line_that_names_them(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged_files()[name])
    with pytest.raises(Blip2Error) as caught:
        images.load_image(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    path = saved(tmp_path, Image.new("1", (10_000, 9_000)), "bomb.png")
    with pytest.raises(Blip2Error, match=r"bomb\.png has 10000 x 9000 pixels"):
        images.load_image(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(Blip2Error, match="does not exist"):
        images.load_image(tmp_path / "none.png")
    with pytest.raises(Blip2Error, match="is a directory"):
        images.load_image(tmp_path)


def test_unreachable_url_names_it():
    with pytest.raises(Blip2Error, match=r"cannot download http://127\.0\.0\.1:9/x\.png"):
        images.load_image("http://127.0.0.1:9/x.png")


@pytest.mark.parametrize(
    "absurd",
    [
        {"rescale_factor": 1e300},
        {"rescale_factor": float("nan")},
        {"mean": (0.5, -1e300, 0.5)},
        {"std": (0.5, 0.5, 1e-300)},
        {"std": (0.5, 0.5, 0.0)},
    ],
)
def test_statistics_that_no_float32_bears_are_refused(absurd):
    with pytest.raises(ValueError, match="no preprocessing of pictures"):
        images.Preprocessing(28, 28, **absurd)


@pytest.mark.parametrize("size", [(4032, 3024), (1000, 700), (449, 600), (300, 200)])
def test_a_jpeg_may_be_decoded_at_a_smaller_scale(size):
    """Of at least the side that is asked for, upright as ever, and of pixels that differ little."""
    width, height = size
    smooth = Image.effect_noise((24, 18), 90).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = io.BytesIO()
    smooth.convert("RGB").save(content, "JPEG", quality=92, exif=exif)
    exact = images.decode_image(content.getvalue(), "it")
    fast = images.decode_image(content.getvalue(), "it", 448)
    assert exact.size == (height, width)
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(width, height) // s >= 448)
    assert fast.size == (-(-height // scale), -(-width // scale))
    preprocessing = images.Preprocessing(224, 224)
    pixels = [images.resized_pixels(image, preprocessing).astype(int) for image in (exact, fast)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 1.5
    assert (scale > 1) == bool(np.any(pixels[0] != pixels[1]))
    png = io.BytesIO()
    smooth.save(png, "PNG")
    same = (images.decode_image(png.getvalue(), "it", side).tobytes() for side in (None, 448))
    assert next(same) == next(same)

"""Preprocessing against Hugging Face's Pillow processor, and every kind of picture there is."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2 import images
from blip2.artifacts import UserError

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
    ours = images.pixel_values(picture, images.Preprocessing(side, side))
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.int32), np.asarray(theirs).view(np.int32))


@pytest.mark.parametrize("extreme", [0, 255])
def test_black_and_white_equal_hugging_face(extreme):
    picture = Image.new("RGB", (50, 40), (extreme,) * 3)
    theirs = BlipImageProcessorPil(size={"height": 224, "width": 224})(picture)["pixel_values"][0]
    assert np.array_equal(images.pixel_values(picture, PREPROCESSING), np.asarray(theirs))


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


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(noise(20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn it clockwise
    loaded = images.load_image(saved(tmp_path, image, "a.png", exif=exif))
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(image), -1))


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
    with pytest.raises(UserError) as caught:
        images.load_image(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    path = saved(tmp_path, Image.new("1", (10_000, 9_000)), "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png has 10000 x 9000 pixels"):
        images.load_image(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        images.load_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a directory"):
        images.load_image(tmp_path)


def test_unreachable_url_names_it():
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/x\.png"):
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

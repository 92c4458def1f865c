"""Preprocessing against timm's, class names, and images that cannot be used."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import ImageNetInfo, create_transform

from outlook_common import VOLO_VARIANTS
from outlook_common.imagenet import class_name, imagenet_names
from outlook_common.images import ImageError, Preprocessing, load_image, preprocess

# (rows, columns): odd and even, upright and lying, smaller and larger than any crop, square.
SIZES = ((37, 53), (301, 199), (240, 240), (224, 333), (640, 427), (233, 500), (389, 389), (1, 9))


def draw_image(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, *channels), np.uint8)
    return PIL.Image.fromarray(pixels)


def as_timm(image: PIL.Image.Image, how: Preprocessing) -> np.ndarray:
    transform = create_transform(
        (3, *how.size),
        is_training=False,
        crop_pct=how.crop_pct,
        mean=how.mean,
        std=how.std,
        interpolation=how.interpolation,
    )
    return transform(image.convert("RGB")).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        Preprocessing((224, 224), 0.96),
        Preprocessing((384, 384), 1.0),
        Preprocessing((448, 448), 1.15),
        Preprocessing((225, 225), 1.15, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bilinear"),
        Preprocessing((96, 160), 0.9),
        Preprocessing((160, 96), 1.15),
    ],
    ids=str,
)
def test_preprocessing_equals_timms_bit_for_bit(size: tuple[int, int], how: Preprocessing) -> None:
    image = draw_image(size)
    found = preprocess(image, how)
    expected = as_timm(image, how)
    assert found.dtype == np.float32
    assert found.shape == (*how.size, 3)
    assert found.std() > 0.1
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("variant", VOLO_VARIANTS)
def test_each_variant_is_prepared_as_timm_prepares_it(variant: str) -> None:
    import timm

    theirs = timm.get_pretrained_cfg(f"{variant}.sail_in1k")
    how = Preprocessing.of(variant)
    assert (3, *how.size) == theirs.input_size
    assert (how.crop_pct, how.mean, how.std) == (theirs.crop_pct, theirs.mean, theirs.std)
    assert (how.interpolation, theirs.crop_mode) == (theirs.interpolation, "center")
    if variant.startswith("volo_d1"):
        image = draw_image((301, 199))
        assert np.array_equal(preprocess(image, variant), preprocess(image, how))


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_converted_as_timm_converts_them(mode: str, tmp_path: Path) -> None:
    image, how = draw_image((60, 41), mode=mode), Preprocessing((32, 32), 0.96)
    image.save(tmp_path / "a.png")
    assert np.array_equal(preprocess(load_image(tmp_path / "a.png"), how), as_timm(image, how))
    assert np.array_equal(preprocess(image, how), as_timm(image, how))


def test_orientation_in_exif_is_left_aside_as_in_timm(tmp_path: Path) -> None:
    image = draw_image((20, 30))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(image))


# Ways in


class Elsewhere:
    """An array of another framework: all that NumPy needs to know of it."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.shape, self._pixels = pixels.shape, pixels

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self._pixels


def ways_in(image: PIL.Image.Image, folder: Path) -> dict[str, object]:
    """Return the same image in every way that `preprocess` takes."""
    image.save(folder / "a.png")
    pixels = np.asarray(image)
    return {
        "Pillow": image,
        "bytes": pixels,
        "float64": pixels / 255,
        "float32": pixels.astype(np.float32) / 255,
        "float16": (pixels / 255).astype(np.float16),
        "bytes in another order": np.asfortranarray(pixels),
        "PyTorch": torch.tensor(pixels),
        "JAX": jnp.asarray(pixels),
        "another framework": Elsewhere(pixels),
        "Path": folder / "a.png",
        "str": str(folder / "a.png"),
    }


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_each_way_in_equals_timms_bit_for_bit(mode: str, tmp_path: Path) -> None:
    image, how = draw_image((60, 41), mode=mode), Preprocessing((32, 48), 0.96)
    expected = as_timm(image, how)
    for way, given in ways_in(image, tmp_path).items():
        found = preprocess(given, how)
        assert found.tobytes() == expected.tobytes(), way
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(preprocess(grey[..., None], how), as_timm(image.convert("L"), how))


def test_several_images_are_prepared_one_by_one(tmp_path: Path) -> None:
    how = Preprocessing((32, 48), 0.96)
    sizes = ((60, 41), (33, 90), (48, 48))
    given = [draw_image(size, seed) for seed, size in enumerate(sizes)]
    expected = np.stack([as_timm(image, how) for image in given])
    given[1].save(tmp_path / "b.png")
    mixed = [given[0], tmp_path / "b.png", np.asarray(given[2]) / 255]
    assert preprocess(mixed, how).tobytes() == expected.tobytes()
    assert preprocess(tuple(mixed), how).tobytes() == expected.tobytes()
    batch = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    expected = np.stack([as_timm(PIL.Image.fromarray(pixels), how) for pixels in batch])
    for given in (batch, batch / 255, torch.tensor(batch), jnp.asarray(batch), list(batch), Elsewhere(batch)):
        assert preprocess(given, how).tobytes() == expected.tobytes()
    assert preprocess([batch[0]], how).shape == preprocess(batch[:1], how).shape == (1, 32, 48, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"shape 3 x 8 x 9: expected .* axis 0 is 3: are they first\? transpose"),
        (np.zeros((8, 9, 5), np.uint8), r"shape 8 x 9 x 5: expected \(H, W\), or .* with 1, 3 or 4 channels$"),
        (np.zeros((9,), np.uint8), "shape 9: expected"),
        (np.zeros((2, 2, 8, 9, 3), np.uint8), "shape 2 x 2 x 8 x 9 x 3: expected"),
        (np.zeros((2, 3, 8, 9), np.uint8), r"images\[0\]: an array of shape 3 x 8 x 9"),
        (np.zeros((0, 8, 9, 3), np.uint8), "no images: the batch is empty"),
        ([], "no images: the batch is empty"),
        (np.zeros((0, 9, 3), np.uint8), "an image without pixels: 0x9"),
        (np.full((8, 9, 3), 200, np.int64), "an array of int64: expected uint8 in 0…255 or floats in 0…1"),
        (np.zeros((8, 9, 3), bool), "an array of bool: expected uint8"),
        (np.full((8, 9, 3), 255.0), "float64 with values from 255 to 255: expected floats in 0…1"),
        (np.linspace(-2, 2, 216).reshape(8, 9, 3), "values from -2 to 2: expected floats in 0…1, not yet normalised"),
        (np.full((8, 9, 3), np.nan, np.float32), "float32 with values from nan to nan"),
        (b"GIF89a", "an image of type bytes: expected a path, a Pillow image or an array"),
        (None, "an image of type NoneType"),
        ([np.zeros((8, 9, 3), np.uint8), 7], r"images\[1\]: an image of type int"),
    ],
)
def test_what_is_no_image_is_refused_with_what_came(given: object, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        preprocess(given, Preprocessing((8, 8), 1.0))


def test_of_several_files_the_bad_one_is_named(tmp_path: Path) -> None:
    draw_image((8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ImageError, match=r"images\[1\]: .*bad\.png: not an image of a known format"):
        preprocess([tmp_path / "good.png", tmp_path / "bad.png"], Preprocessing((8, 8), 1.0))


# Images that cannot be used


def png(*, width: int, height: int) -> bytes:
    """Return a PNG's head that claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    length = struct.pack(">I", 13)
    return b"\x89PNG\r\n\x1a\n" + length + header + struct.pack(">I", zlib.crc32(header)) + length + b"IDAT"


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    draw_image((64, 64)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (encoded("PNG")[:3000], "not a readable image: .*truncated"),
        (encoded("JPEG")[:700], "not a readable image: .*truncated"),
        (encoded("PNG")[:60] + bytes(2000) + encoded("PNG")[2060:], "not a readable image: "),
        (b"weights, not pixels", "not an image of a known format"),
        (b"", "not an image of a known format"),
        (png(width=20000, height=20000), r"400000000 pixels\) exceeds limit of"),
        (b"P6 0 5 255\n", "not an image of a known format"),
    ],
    ids=["cut PNG", "cut JPEG", "damaged", "text", "empty", "huge", "no pixels"],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, contents: bytes, words: str) -> None:
    path = tmp_path / "photo[1].png"
    path.write_bytes(contents)
    with pytest.raises(ImageError, match=words) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_file_and_a_folder_are_the_systems_own_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path)


def test_an_image_without_pixels_or_too_narrow_to_enlarge_is_refused() -> None:
    with pytest.raises(ImageError, match="without pixels: 5x0"):
        preprocess(PIL.Image.new("RGB", (0, 5)), "volo_d1_224")
    with pytest.raises(ImageError, match=r"1x60000 pixels is too narrow.* 233x13980000"):
        preprocess(PIL.Image.new("RGB", (60000, 1)), "volo_d1_224")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((0, 8), 1.0), "size must be at least 1x1 pixels, got 0x8"),
        (((8, 8), 0.0), "crop_pct must be positive, got 0.0"),
        (((8, 8), 1.0, (0.5, 0.5, 0.5), (0.1, 0.0, 0.1)), "std must be positive"),
        (((8, 8), 1.0, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), "cubic"), "one of nearest, .*got 'cubic'"),
    ],
)
def test_preprocessing_out_of_range_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing(*arguments)


def test_an_unknown_variant_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'volo_d1_224'"):
        preprocess(draw_image((8, 8)), "volo_d1_225")


def test_images_need_pillow_only_when_they_are_read() -> None:
    script = """if True:
        import sys, importlib.util
        import outlook_common.images
        assert "PIL" not in sys.modules
        real = importlib.util.find_spec
        outlook_common.extras.find_spec = lambda name: None if name == "PIL" else real(name)
        outlook_common.images.load_image("a.png")"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "reading images needs PIL, which is not installed" in done.stderr
    assert "outlook-attention[images]" in done.stderr


# Names


def test_class_names_are_timms_in_the_same_order() -> None:
    assert list(imagenet_names()) == ImageNetInfo("imagenet-1k").label_descriptions()
    assert class_name(207, 1000) == "golden retriever"


def test_classes_of_other_models_are_numbered() -> None:
    assert class_name(17, 100) == "class 17"
    with pytest.raises(ValueError, match="class 1000 of 1000: expected 0 to 999"):
        class_name(1000, 1000)

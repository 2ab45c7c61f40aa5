"""Image files as people see them: turned, on a background, in all their levels; or refused."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from config.command_line import parse_args
from config.flags import AugmentConfig, DataConfig
from datasets import build_data, decoding_of
from inference.preprocessing import preprocessing_of
from input_pipeline.images import AS_RELEASED, Decoding, Jpeg, load_image, load_lazily
from runtime.errors import UserError

PHOTO = Image.fromarray(np.random.RandomState(0).randint(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
    (40, 30), Image.Resampling.BICUBIC
)


def assert_same(image, expected, atol=0):
    np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(expected), atol=atol)


def with_orientation(path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    PHOTO.save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation_as_pillow_itself_turns_images(tmp_path, suffix, tag):
    path = with_orientation(tmp_path / f"a.{suffix}", tag)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
        assert_same(load_image(path), expected)
    if suffix == "jpg":
        pytest.importorskip("simplejpeg")
        lazily = load_lazily(path, Decoding())
        assert isinstance(lazily, Jpeg) == (tag == 1)
        if tag > 1:
            assert_same(lazily, expected)
        lying = load_image(path, AS_RELEASED)
        assert lying.size == (40, 30)
        assert (tag == 1) == (lying.tobytes() == expected.tobytes())


@pytest.mark.parametrize("tag", range(1, 9))
def test_uncompressed_grey_tiffs_are_turned(tmp_path, tag):
    grey = PHOTO.convert("L")
    grey.getexif()[0x0112] = tag
    grey.save(tmp_path / "a.tif", exif=grey.getexif())
    assert_same(load_image(str(tmp_path / "a.tif")), ImageOps.exif_transpose(grey).convert("RGB"))


def test_a_mean_alone_of_timm_is_kept():
    flags = {"img_size": 224, "mean": [0.1, 0.2, 0.3]}
    view = preprocessing_of(flags, 224, Path("c.pth"))
    assert (view.mean, view.std) == ((0.1, 0.2, 0.3), (0.229, 0.224, 0.225))


def test_damaged_exif_does_no_harm(tmp_path):
    PHOTO.save(tmp_path / "plain.png")
    for number, exif in enumerate(
        (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"none", b"\xff" * 99)
    ):
        PHOTO.save(tmp_path / f"{number}.png", exif=exif)
        assert_same(load_image(str(tmp_path / f"{number}.png")), PHOTO)


def test_transparency_is_laid_on_the_background(tmp_path):
    """Half of a red image is transparent; what is stored below it does not show."""
    rgba = np.zeros((4, 8, 4), np.uint8)
    rgba[:, :4] = 255, 0, 0, 255
    rgba[:, 4:] = 1, 2, 3, 0
    image = Image.fromarray(rgba)
    image.save(tmp_path / "rgba.png")
    image.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    image.save(tmp_path / "rgba.tif")
    palette = Image.fromarray((rgba[..., 3] == 0).astype(np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 1, 2, 3])
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    Image.fromarray(rgba[..., :3]).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    for path in tmp_path.iterdir():
        found = np.asarray(load_image(str(path)))
        assert (found[:, :4] == (255, 0, 0)).all(), path
        assert (found[:, 4:] == 255).all(), path
        found = np.asarray(load_image(str(path), Decoding(background="#102030")))
        assert (found[:, 4:] == (0x10, 0x20, 0x30)).all(), path
        found = np.asarray(load_image(str(path), AS_RELEASED))
        assert_same(found, Image.open(path).convert("RGB"))
        assert (found[:, 4:] == (1, 2, 3)).all(), path
    grey = Image.fromarray(
        np.dstack([np.full((4, 8), 9), np.full((4, 8), 127)]).astype(np.uint8), "LA"
    )
    grey.save(tmp_path / "la.png")
    assert_same(
        load_image(str(tmp_path / "la.png")), np.full((4, 8, 3), 255 + (9 - 255) * 127 / 255), 1
    )
    # without transparent pixels nothing changes
    PHOTO.convert("RGBA").save(tmp_path / "opaque.png")
    assert_same(load_image(str(tmp_path / "opaque.png")), PHOTO)


@pytest.mark.parametrize(
    "pixels",
    [np.linspace(0, 1, 64, dtype=np.float32), np.linspace(0, 65535, 64, dtype=np.float32)]
    + [np.arange(64, dtype=np.int32), np.arange(64, dtype=np.int32) << 24],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path, pixels):
    Image.fromarray(np.tile(pixels, (8, 1))).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be read: .* convert it to 8 or 16 bits"):
        load_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm"])
def test_16_bits_keep_their_levels(tmp_path, name):
    ramp = np.tile(np.linspace(0, 65535, 64), (8, 1)).astype(
        ">u2" if name == "big.tif" else np.uint16
    )
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 64 8 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / name)
    expected = np.repeat((ramp / 257).round()[..., None], 3, axis=2)
    assert_same(load_image(str(tmp_path / name)), expected)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("plug-in"), NotImplementedError("DXT9"), AttributeError("x"), MemoryError()]
    + [struct.error("short"), EOFError("end"), IndexError(), KeyError(7), zlib.error("bad")],
)
def test_any_exception_of_a_plug_in_is_a_bad_image(tmp_path, monkeypatch, error):
    PHOTO.save(tmp_path / "a.png")

    def fail(*_):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=r"image .*a\.png cannot be read: .+"):
        load_image(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "format_", ["AVIF", "DDS", "ICNS", "JPEG2000", "PCX", "SGI", "TGA", "WEBP"]
)
def test_damaged_files_of_any_format_are_bad_images(tmp_path, format_):
    buffer = io.BytesIO()
    PHOTO.resize((64, 64)).save(buffer, format=format_)
    whole, random = buffer.getvalue(), np.random.RandomState(1)
    path = tmp_path / "a.jpg"
    for _ in range(60):
        damaged = bytearray(whole)
        for position in random.randint(0, min(200, len(whole)), 3):
            damaged[position] = random.randint(256)
        path.write_bytes(damaged[: random.randint(1, len(whole) + 1)])
        with suppress(UserError):
            assert load_image(str(path)).mode == "RGB"


def test_large_texts_and_profiles_beside_sound_pixels(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    text.add_itxt("more", "y" * (2 << 20), zip=True)
    PHOTO.save(tmp_path / "a.png", pnginfo=text, icc_profile=bytes(3 << 20))
    assert_same(load_image(str(tmp_path / "a.png")), PHOTO)


@pytest.mark.parametrize(
    ("flags", "decoding"),
    [
        (["--data_set", "image_folder"], Decoding()),
        (["--data_set", "tar", "--background", "none"], Decoding(True, None)),
        (["--data_set", "IMNET"], Decoding(False)),
        (["--data_set", "IMNET", "--exif_orientation", "true"], Decoding()),
        (["--data_set", "image_folder", "--exif_orientation", "false"], Decoding(False)),
        (["--data_set", "image_folder", "--background", "#808080"], Decoding(True, "#808080")),
    ],
)
def test_a_run_and_the_tools_after_it_see_the_same(flags, decoding):
    config = parse_args(flags)
    assert decoding_of(config.data) == decoding
    if config.data.data_set != "IMNET":
        assert preprocessing_of(config.flat(), 224, Path("c.pth")).decoding == decoding


def test_tools_see_as_earlier_runs_and_published_weights_did():
    for flags, decoding in (
        ({}, Decoding()),
        ({"data_set": "IMNET"}, Decoding()),  # the tools are for people's own images
        ({"data_set": "image_folder", "val_fraction": 0.1}, AS_RELEASED),
    ):
        assert preprocessing_of(flags, 224, Path("c.pth")).decoding == decoding
    flags = {"data_set": "tar", "exif_orientation": None, "background": "no colour"}
    with pytest.raises(UserError, match="c.pth: its images cannot be prepared: unknown color"):
        preprocessing_of(flags, 224, Path("c.pth"))


def test_a_background_that_is_no_colour():
    with pytest.raises(UserError, match="--background whit: give a colour such as white"):
        parse_args(["--background", "whit"])


@pytest.mark.parametrize("turns", [None, False])
def test_images_of_a_folder_are_turned_in_training_and_evaluation(tmp_path, turns):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            with_orientation(tmp_path / name / f"{index}.jpg", 6)
    config = DataConfig("image_folder", str(tmp_path), val_fraction=0.5, exif_orientation=turns)
    data = build_data(config, AugmentConfig(), 32)
    expected = (40, 30) if turns is False else (30, 40)
    assert data.train.read(0)[0].size == data.val.read(0)[0].size == expected

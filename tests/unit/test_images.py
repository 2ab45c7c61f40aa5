"""Reading images faster, with other pixels, against reading them exactly."""

import io
import random
import sys

import numpy as np
import pytest
from PIL import Image

from config.flags import AugmentConfig, DataConfig
from datasets import build_data
from input_pipeline.images import Jpeg, OpenCVImage, crop_resized, load_image, load_lazily
from input_pipeline.transforms import WARPS, FastCrop, _warped, crops_fast, train_transform
from runtime.errors import UserError

pytest.importorskip("cv2")
pytest.importorskip("simplejpeg")

STATISTICS = (0.5,) * 3, (0.25,) * 3


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours that differ everywhere: any shift, mirroring or swap of channels shows."""
    coarse = np.random.RandomState(0).randint(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def both_crops(path, seed: int) -> list[np.ndarray]:
    """(exactly, fast), of the same random numbers."""
    crops, following = [], []
    for fast in (False, True):
        crop = train_transform(AugmentConfig(fast_decode=fast), 64, *STATISTICS).transforms[0]
        random.seed(seed)
        image = load_lazily(str(path)) if fast else load_image(str(path))
        crops.append(np.asarray(crop(image)).astype(int))
        following.append(random.random())
    assert following[0] == following[1]
    return crops


@pytest.mark.parametrize("size", [(80, 60), (500, 375), (60, 900), (2048, 1500)])
@pytest.mark.parametrize("kind", ["a.jpg", "grey.jpg", "cmyk.jpg", "a.png"])
def test_the_same_region_with_nearly_the_same_pixels(tmp_path, size, kind):
    image = photo(*size)
    mode = {"grey.jpg": "L", "cmyk.jpg": "CMYK"}.get(kind, "RGB")
    image.convert(mode).save(tmp_path / kind, quality=95)
    for seed in range(5):
        exact, fast = both_crops(tmp_path / kind, seed)
        assert exact.shape == fast.shape == (64, 64, 3)
        assert np.abs(exact - fast).mean() < 4  # of 256 levels; a flip or a shift gives 20 to 90


def test_crops_are_not_shifted(tmp_path):
    """On a ramp, a shift is a difference of levels."""
    ramp = np.linspace(0, 255, 2000).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (1500, 2000))).convert("RGB").save(
        tmp_path / "ramp.jpg", quality=100
    )
    shifts = []
    for seed in range(60):
        exact, fast = both_crops(tmp_path / "ramp.jpg", seed)
        slope = (exact[:, -4].mean() - exact[:, 3].mean()) / 57  # levels a pixel
        shifts.append((fast - exact).mean() / slope)
    assert abs(np.mean(shifts)) < 0.1, np.mean(shifts)  # pixels of the crop
    assert np.abs(shifts).max() < 1


@pytest.mark.parametrize("warp", WARPS, ids=lambda warp: warp.__name__)
@pytest.mark.parametrize("method", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_opencv_turns_and_shifts_as_pillow(warp, method):
    image = photo(90, 60)
    for amount in (-0.2, 0.05, 0.3):
        amount *= {"rotate": 90}.get(warp.__name__, 30 if warp.__name__.endswith("abs") else 1)
        options = {"resample": method, "fillcolor": (200, 10, 90)}
        exact = np.asarray(warp(image, amount, **options)).astype(int)
        fast = np.asarray(warp(OpenCVImage(image), amount, **options)).astype(int)
        difference = np.abs(exact - fast).max(2)
        assert np.median(difference) <= 1  # of 256 levels
        assert (difference > 8).mean() < 0.05  # the border of the image


def test_only_what_is_fast_is_warped_by_opencv():
    def warps(fast):
        policy = train_transform(AugmentConfig(fast_decode=fast), 64, *STATISTICS).transforms[2]
        return {op.name for op in policy.ops if getattr(op.aug_fn, "func", None) is _warped}

    assert warps(False) == set()
    assert warps(True) == {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
    view = train_transform(AugmentConfig(fast_decode=True), 64, *STATISTICS)
    images = {view.for_batch(photo(90, 70)).sum().item() for _ in range(20)}
    assert len(images) == 20


def test_a_large_jpeg_is_decoded_no_larger_than_needed(tmp_path):
    photo(1600, 1200).save(tmp_path / "a.jpg")
    jpeg = load_lazily(str(tmp_path / "a.jpg"))
    assert isinstance(jpeg, Jpeg)
    assert jpeg.decode(150, 200).shape == (150, 200, 3)
    assert jpeg.decode(301, 400).shape == (450, 600, 3)
    assert crop_resized(jpeg, (0, 0, 1200, 1600), (150, 200), "bicubic").size == (200, 150)


def test_what_is_fast_ends_in_the_same_errors(tmp_path):
    whole = io.BytesIO()
    photo(300, 200).save(whole, "JPEG")
    data = whole.getvalue()
    for name, damaged in {"cut.jpg": data[: len(data) // 2], "empty.jpg": b"",
                          "text.jpg": b"no image"}.items():  # fmt: skip
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_image(str(tmp_path / name))
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            crop_resized(load_lazily(str(tmp_path / name)), (0, 0, 9, 9), (8, 8), "bicubic")


def test_only_training_images_are_read_fast(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(2):
            photo(80, 60).save(tmp_path / label / f"{index}.jpg")
    config = DataConfig(
        data_set="image_folder", data_path=str(tmp_path), val_fraction=0.5, num_workers=0
    )
    data = build_data(config, AugmentConfig(fast_decode=True), 64)
    assert crops_fast(data.train.transform)
    assert isinstance(data.train.read(0)[0], Jpeg)
    assert not isinstance(data.val.transform.transforms[0], FastCrop)
    assert isinstance(data.val.read(0)[0], Image.Image)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match=r"--fast_decode needs .*\[fast\]'?: import of simplejpeg"):
        train_transform(AugmentConfig(fast_decode=True), 64, *STATISTICS)
    # which crops by padding, and needs nothing
    assert not crops_fast(train_transform(AugmentConfig(fast_decode=True), 32, *STATISTICS))

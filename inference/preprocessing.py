"""How an image becomes the input of a trained classifier."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import ImageColor

from config.flags import DataConfig
from input_pipeline.images import AS_RELEASED, Decoding, load_image
from input_pipeline.transforms import (
    CROP_PCT,
    SplitTransform,
    eval_transform,
    is_warped,
    mean_std,
)
from runtime.errors import UserError
from runtime.sizes import Size, as_size, size_text


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation's preprocessing; TypeError or ValueError for values that cannot work."""

    input_size: Size  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # visible fraction of the short side, CROP_PCT by default; None if the image is warped
    crop_pct: float | None = None
    decoding: Decoding = Decoding()

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", as_size(self.input_size))
        channels = self.decoding.channels
        if {len(self.mean), len(self.std)} != {channels} or not min(self.std) > 0:
            raise ValueError(f"mean {self.mean}, std {self.std}")
        if self.crop_pct is not None and not 0.05 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct {self.crop_pct}")
        crop_pct = None if is_warped(self.input_size) else self.crop_pct or CROP_PCT
        object.__setattr__(self, "crop_pct", crop_pct)

    def load(self, file: Path) -> Any:
        """Read an image as `load_image` does; UserError if it is unreadable."""
        return load_image(str(file), self.decoding)

    @cached_property
    def transform(self) -> SplitTransform:
        return eval_transform(
            self.input_size, self.mean, self.std, self.crop_pct, as_array=self.decoding.as_array
        )


def preprocessing_of(flags: dict[str, Any], size: Size, path: Path) -> Preprocessing:
    """Return the preprocessing by a checkpoint's flags, ours or timm's; UserError if we lack it."""
    of_imagenet = bool(flags.get("imagenet_default_mean_and_std", True))
    mode = "squash" if is_warped(size) else "center"
    try:
        channels = flags.get("in_chans") or 3
        given = {n: tuple(map(float, flags[n])) for n in ("mean", "std") if flags.get(n)}
        data = DataConfig(
            in_chans=channels,
            imagenet_default_mean_and_std=of_imagenet,
            **given,  # type: ignore
        )
        mean, std = mean_std(data)
        span = flags.get("value_range") and tuple(map(float, flags["value_range"]))
        decoding = replace(_decoding_of(flags), channels=channels, value_range=span or None)
        crop_pct = float(flags.get("crop_pct") or CROP_PCT)
        preprocessing = Preprocessing(size, mean, std, crop_pct, decoding)
        if (flags.get("crop_mode") or mode) != mode:
            raise ValueError(
                f"crop_mode {flags['crop_mode']} at {size_text(size)} pixels, which this project "
                "does not have"
            )
        if flags.get("crop_mode") == "squash" and crop_pct != 1:
            raise ValueError(f"crop_pct {crop_pct} of the squashed image")
        if flags.get("interpolation") not in (None, "bicubic"):
            raise ValueError(f"interpolation {flags['interpolation']} instead of bicubic")
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: its images cannot be prepared: {error}") from None
    return preprocessing


def _decoding_of(flags: dict[str, Any]) -> Decoding:
    """Return how a run decoded people's own images; without such a run, the default."""
    is_converted = "data_set" not in flags and "background" in flags
    if not is_converted and flags.get("data_set") not in ("image_folder", "tar", "multi_label"):
        return Decoding()
    if "exif_orientation" not in flags:  # a run of the release, or from before the flag
        return AS_RELEASED
    turns, background = flags["exif_orientation"] is not False, str(flags.get("background"))
    if background == "none":
        return Decoding(turns, None)
    ImageColor.getrgb(background)  # a ValueError if it is no colour
    return Decoding(turns, background)

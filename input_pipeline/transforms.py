"""Images -> inputs of the model: augmentation for training, preprocessing for evaluation."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import constants, create_transform
from timm.data.auto_augment import (
    posterize,
    rotate,
    shear_x,
    shear_y,
    translate_x_abs,
    translate_x_rel,
    translate_y_abs,
    translate_y_rel,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import (
    MaybePILToTensor,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
    interp_mode_to_str,
)
from torch import nn
from torchvision import transforms
from torchvision.transforms import CenterCrop, Compose

from config.flags import AugmentConfig, DataConfig
from input_pipeline.images import Jpeg, OpenCVImage, crop_resized
from runtime.errors import UserError
from runtime.sizes import Size, sides

SMALL_INPUT = 32  # up to this size, images are warped, and padded and cropped in training
CROP_PCT = 224 / 256  # default fraction of the short side in evaluation
WARPED_INPUT = 384  # from this size on, evaluation warps the whole image to a square


class Finish(nn.Module):
    """The last steps of a transform: normalisation and, in training, random erasing.

    They take whole batches, on their device, so that workers send a quarter of the bytes.
    """

    levels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        erasing: RandomErasing | None = None,
    ) -> None:
        super().__init__()
        self.erasing = erasing
        # on GPUs, division by a Python number is a product with its rounded inverse
        self.register_buffer("levels", torch.tensor(255.0))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), uint8 or float32 from 0 to 1 -> float32 inputs of the model.

        They are contiguous, and on the device of the images, which has to be that of this module.
        """
        if not images.is_floating_point():
            images = images.to(torch.float32, memory_format=torch.contiguous_format)
            images = images.div_(self.levels)
        inputs = images.sub(self.mean).div_(self.std)
        return self.erasing(inputs) if self.erasing else inputs


class SplitTransform(Compose):
    """A transform of which a loader's workers do `for_batch`, and the device does `finish`.

    `steps` make of an image a tensor (C, H, W), uint8, or float32 from 0 to 1.
    """

    def __init__(self, steps: Sequence[Any], finish: Finish) -> None:
        super().__init__([*steps])
        self.finish = finish

    def for_batch(self, image: Any) -> torch.Tensor:
        """Image -> tensor (C, H, W), uint8 or float32, of which `finish` takes batches."""
        return super().__call__(image)

    def __call__(self, image: Any) -> torch.Tensor:
        """Image -> input of the model, float32 (C, H, W)."""
        return self.finish(self.for_batch(image)[None])[0]


def mean_std(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, for normalisation."""
    count = config.in_chans
    mean = std = (0.5,) * count  # for RGB, Inception's
    if count == 3 and config.imagenet_default_mean_and_std:
        mean, std = constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD
    given_mean, given_std = (
        values and values * (count // len(values)) for values in (config.mean, config.std)
    )
    return given_mean or mean, given_std or std


def train_transform(
    config: AugmentConfig,
    size: Size,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    as_array: bool = False,
) -> SplitTransform:
    """Return random crop, flip, RandAugment and erasing: image -> float tensor (C, H, W).

    With `as_array` images are tensors (C, H, W) from 0 to 1, and there is no RandAugment.
    """
    erasing = RandomErasing(
        config.reprob, mode=config.remode, max_count=config.recount, device="cpu"
    )
    finish = Finish(mean, std, erasing if config.reprob else None)
    if as_array:
        return SplitTransform(_train_steps_of_arrays(config, size), finish)
    try:
        transform = create_transform(
            sides(size),
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.aa,
            interpolation=config.train_interpolation,
            mean=mean,  # the colour of pixels beyond a turned image
            normalize=False,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"augmentation cannot be built from --aa {config.aa} and --train_interpolation "
            f"{config.train_interpolation}: {error or type(error).__name__}"
        ) from None
    allow_zero_bits(transform)
    if max(sides(size)) <= SMALL_INPUT and config.scale is None:
        crop = transforms.RandomCrop(sides(size), padding=4)
        transform.transforms[0] = Compose([_resize(sides(size)), crop])
    elif config.fast_decode:
        transform.transforms[0] = FastCrop(transform.transforms[0])
        _warp_fast(transform)
    return SplitTransform(transform.transforms, finish)


def _train_steps_of_arrays(config: AugmentConfig, size: Size) -> list[Any]:
    if max(sides(size)) <= SMALL_INPUT and config.scale is None:
        crop: list[Any] = [_resize(sides(size)), transforms.RandomCrop(sides(size), padding=4)]
    else:
        mode = transforms.InterpolationMode(config.train_interpolation)
        scale, ratio = config.scale or (0.08, 1.0), config.ratio
        crop = [transforms.RandomResizedCrop(sides(size), scale, ratio, mode)]
    return [*crop, _clip, transforms.RandomHorizontalFlip(config.hflip)]


def _clip(image: torch.Tensor) -> torch.Tensor:
    return image.clamp(0, 1)  # bicubic interpolation overshoots


class SizeSchedule:
    """Training transforms for sizes that depend on the epoch (--size_schedule).

    `transforms_by_epoch`: first epoch of a transform -> transform. Set `epoch` before each image.
    """

    def __init__(self, transforms_by_epoch: dict[int, SplitTransform]) -> None:
        self.transforms_by_epoch, self.epoch = transforms_by_epoch, 0

    @property
    def current(self) -> SplitTransform:
        return self.transforms_by_epoch[max(e for e in self.transforms_by_epoch if e <= self.epoch)]

    @property
    def transforms(self) -> list[Any]:
        return self.current.transforms

    @property
    def finish(self) -> Finish:
        return self.current.finish

    def for_batch(self, image: Any) -> torch.Tensor:
        return self.current.for_batch(image)

    def __call__(self, image: Any) -> torch.Tensor:
        return self.current(image)


class FastCrop(RandomResizedCropAndInterpolation):
    """timm's random crop of the same region, with approximate pixels (`crop_resized`)."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        try:
            import cv2  # noqa: F401 - an early error if one is missing
            import simplejpeg  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--fast_decode needs cv2 and simplejpeg, pip install '.[fast]': {error}"
            ) from None
        super().__init__(crop.size, crop.scale, crop.ratio)
        self.interpolation = crop.interpolation

    def __call__(self, image: Jpeg | Image.Image) -> Image.Image:
        shape = torch.empty(1).expand(1, image.height, image.width)  # takes no memory
        box = self.get_params(shape, self.scale, self.ratio)
        drawn = isinstance(self.interpolation, list | tuple)
        mode = random.choice(self.interpolation) if drawn else self.interpolation
        return crop_resized(image, box, self.size, interp_mode_to_str(mode))


def crops_fast(transform: Any) -> bool:
    """Return whether a transform begins with a FastCrop."""
    return isinstance(getattr(transform, "transforms", [None])[0], FastCrop)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def allow_zero_bits(transform: Compose) -> None:
    """Let timm's policies posterize to 0 bits at magnitude 10, which Pillow >= 13 refuses.

    Earlier versions gave a black image, with which the published policies were used.
    """
    for op in _operations(transform):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _operations(transform: Compose) -> Iterator[Any]:
    """Yield the operations of timm's policies."""
    for member in transform.transforms:
        yield from chain(getattr(member, "ops", []), *getattr(member, "policy", []))


WARPS = (rotate, shear_x, shear_y, translate_x_rel, translate_y_rel, translate_x_abs,
         translate_y_abs)  # fmt: skip
"""Operations of timm that are affine."""


def _warp_fast(transform: Compose) -> None:
    """Let OpenCV turn, shear and shift, which takes Pillow longer than its other operations."""
    for op in _operations(transform):
        if op.aug_fn in WARPS:
            op.aug_fn = partial(_warped, op.aug_fn)


def _warped(
    warp: Callable[..., Image.Image], image: Image.Image, *amounts: Any, **options: Any
) -> Any:
    return warp(OpenCVImage(image), *amounts, **options)


def eval_transform(
    size: Size,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float | None = None,
    crops: bool = False,
    as_array: bool = False,
) -> SplitTransform:
    """Return the evaluation's preprocessing: image -> float tensor (3, height, width).

    For several `crops` of that size height and width are those divided by crop_pct. With `as_array`
    images are tensors (C, H, W) from 0 to 1.
    """
    height, width = sides(size)
    larger = [int(side / (crop_pct or CROP_PCT)) for side in (height, width)]
    shown = larger if crops else [height, width]
    if crops and shown == [height, width]:
        raise UserError("--tta crops: with --crop_pct 1 all crops are the same: leave it out")
    covers = (
        _resize(larger[0]) if height == width else ResizeKeepRatio(larger, interpolation="bicubic")
    )
    view = [_resize(shown)] if is_warped(size) else [covers, CenterCrop(shown)]
    return SplitTransform([*view, _clip if as_array else MaybePILToTensor()], Finish(mean, std))


def is_warped(size: Size) -> bool:
    """Return whether evaluation warps the whole image to this size."""
    return min(sides(size)) >= WARPED_INPUT or max(sides(size)) <= SMALL_INPUT


def _resize(size: int | Sequence[int]) -> transforms.Resize:
    return transforms.Resize(size, transforms.InterpolationMode.BICUBIC)

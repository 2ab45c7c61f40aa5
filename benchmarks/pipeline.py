"""What training and prediction do beside the network: EMA and optimizer, reading of images."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from benchmarks.measure import Row, Timing, paired
from config.flags import AugmentConfig, DataConfig, OptimConfig
from engine import clip_gradient
from inference.classifier import untrained_classifier
from inference.prediction import predictions, write_predictions
from input_pipeline.folders import list_classes
from input_pipeline.image_sets import ListedImages
from input_pipeline.loaders import TrainLoader
from input_pipeline.packing import Packing, packed
from input_pipeline.transforms import allow_zero_bits, mean_std, train_transform
from input_pipeline.unreadable import UnreadableImages
from optim_factory import create_optimizer
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError

CPU = torch.device("cpu")
PHOTOS, BATCH = 256, 32


def loop(rounds: int, device: torch.device) -> Iterator[Row]:
    """Measure EMA, clipping and AdamW; the peer is a Python loop with PyTorch's defaults."""
    name = "hornet_large_7x7"
    model = timm.create_model(name).to(device)
    ema = ModelEmaV3(model, decay=0.9999)
    fast = create_optimizer(OptimConfig(), model, 1e-3)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def ours() -> None:
        clip_gradient(parameters, 5.0)
        fast.step()
        ema.update(model)

    @torch.no_grad()
    def theirs() -> None:
        nn.utils.clip_grad_norm_(parameters, 5.0)
        plain.step()
        for kept, weight in zip(ema.module.parameters(), parameters, strict=True):
            kept.copy_(0.9999 * kept + (1 - 0.9999) * weight)

    timings = paired({"peer": theirs, "ours": ours}, rounds, device)
    share = median(timings["peer"].ratios_to(timings["ours"]))
    detail = f"{1e3 * timings['ours'].median:.0f} ms, peer {1e3 * timings['peer'].median:.0f} ms"
    what = "EMA, clipping and AdamW: share of the time"
    yield Row(name, what, share, f"{detail}, n = {rounds}")


def loader(rounds: int, _: torch.device) -> Iterator[Row]:
    """Measure images per second of one worker; the peer is torch's with timm's transform."""
    case = "500 x 375 JPEG to 224, RandAugment"
    config, data = AugmentConfig(), DataConfig(batch_size=BATCH, num_workers=1)
    with tempfile.TemporaryDirectory() as folder:
        photos, small = Path(folder) / "photos", Path(folder) / "small"
        _write_class(photos, small)
        transform = create_transform(
            224, is_training=True, auto_augment=config.aa, interpolation="bicubic",
            re_prob=config.reprob, re_mode=config.remode, re_count=config.recount,
            color_jitter=config.color_jitter,
        )  # fmt: skip
        allow_zero_bits(transform)  # the policy needs it with Pillow >= 13
        runs = {"peer": partial(_drain, _one_worker(ImageFolder(photos, transform)))}
        unreadable = UnreadableImages(Path(folder) / "bad_images.txt", 0)
        for name, root, fast in (
            ("same pixels", photos, False),
            ("--fast_decode", photos, True),
            ("tools.pack", small, False),
            ("tools.pack, --fast_decode", small, True),
        ):
            try:
                view = train_transform(replace(config, fast_decode=fast), 224, *mean_std(data))
                images = ListedImages(list_classes(root), view)
                ours = TrainLoader(images, data, SINGLE_PROCESS, unreadable)
                runs[name] = partial(_drain, partial(ours.batches, 0, 0))
            except UserError as error:  # packages are missing
                yield Row(case, f"loader, {name}", None, str(error))
        timings = paired(runs, rounds, CPU)
    peer = timings.pop("peer")
    for name, own in timings.items():
        yield _rate(case, f"loader, {name}", own, peer)


def predict(rounds: int, _: torch.device) -> Iterator[Row]:
    """Measure images per second of tools.predict with a network that only averages colours.

    The peer is torch's loader with timm's transform and the same workers, without a network. Both
    start their workers in each run.
    """
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
    network.num_classes = 10  # type: ignore[assignment]
    classifier = untrained_classifier(network, "mean colour", 224)
    view = classifier.preprocessing
    transform = create_transform(
        224, interpolation="bicubic", crop_pct=view.crop_pct, mean=view.mean, std=view.std
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "a", 32)
        _link(folder / "a")
        photos, files = ImageFolder(folder, transform), sorted((folder / "a").iterdir())

        def ours(workers: int) -> None:
            run = partial(
                predictions, classifier, device=CPU, topk=5, batch_size=BATCH, num_workers=workers
            )
            output = folder / "found.csv"
            write_predictions(run, files, output, None, SINGLE_PROCESS, "")
            output.unlink()

        def theirs(workers: int) -> None:
            _drain(lambda: iter(DataLoader(photos, BATCH, num_workers=workers)))

        for workers in (1, 2):
            runs = {"ours": partial(ours, workers), "peer": partial(theirs, workers)}
            timings = paired(runs, rounds, CPU)
            what = f"tools.predict to CSV, workers: {workers}"
            yield _rate("500 x 375 JPEG to 224", what, timings["ours"], timings["peer"])


def _rate(case: str, what: str, own: Timing, peer: Timing) -> Row:
    """Return the row of two ways to read PHOTOS images."""
    detail = f"{PHOTOS / own.median:.0f} images/s, peer {PHOTOS / peer.median:.0f}"
    return Row(case, what, median(own.ratios_to(peer)), f"{detail}, n = {len(own.seconds)}")


def _write_class(photos: Path, small: Path) -> None:
    """Write a class of links to 32 photographs, and one of links to their packed copies."""
    write_photos(photos / "a", 32)
    (small / "a").mkdir(parents=True)
    for file in [*(photos / "a").iterdir()]:
        copy = small / "a" / file.name
        copy.write_bytes(packed(str(file), Packing())[0])
    for folder in (photos / "a", small / "a"):
        _link(folder)


def _link(folder: Path) -> None:
    """Link the files of a folder until there are PHOTOS of them."""
    files = [*folder.iterdir()]
    for file, number in product(files, range(1, PHOTOS // len(files))):
        os.link(file, file.with_name(f"{number}-{file.name}"))


def _one_worker(source: Dataset) -> Callable[[], Iterator[Any]]:
    """Return torch's loader, whose iterator begins an epoch."""
    loader = DataLoader(
        source, BATCH, shuffle=True, num_workers=1, persistent_workers=True, drop_last=True
    )
    return lambda: iter(loader)


def _drain(epoch: Callable[[], Iterator[Any]]) -> None:
    for _ in epoch():
        pass


def write_photos(folder: Path, count: int) -> None:
    """Write JPEG files of 500 x 375 pixels: smooth colours with noise, as large as photographs."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for index in range(count):
        coarse = Image.fromarray(random.randint(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + random.randint(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)

"""Folders, transforms, shards and loaders."""

import gc
import multiprocessing
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from config.flags import AugmentConfig, DataConfig, MixupConfig, SamplingConfig
from datasets import build_data
from engine import evaluate
from input_pipeline.digits import write_digits
from input_pipeline.folders import list_classes
from input_pipeline.image_sets import ImageSet, ListedImages, spread_evenly
from input_pipeline.images import load_image
from input_pipeline.loaders import EpochOrder, TrainLoader, _tell_of_cores, eval_loader
from input_pipeline.timm_sets import _class_names
from input_pipeline.transforms import eval_transform, train_transform
from input_pipeline.unreadable import UnreadableImages
from runtime.distributed import DistributedContext, shard
from runtime.errors import UserError
from tests.drawings import write_drawings
from training.build import build_mixup
from utils import seed_host

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def write_images(root, counts, size=(40, 30)):
    """One folder a class, with that many images of one grey level each."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (label * 40 + index,) * 3).save(root / name / f"{index}.png")


def context(rank=0, world_size=1):
    return DistributedContext(rank, rank, world_size, torch.device("cpu"))


def test_image_folder_reads_classes_and_labels(tmp_path):
    write_images(tmp_path / "train", {"ant": 2, "bee": 3})
    write_images(tmp_path / "val", {"ant": 1, "bee": 1})
    config = DataConfig(data_set="image_folder", data_path=str(tmp_path))
    data = build_data(config, AugmentConfig(), 64)
    assert data.classes == ["ant", "bee"]
    assert (len(data.train), len(data.val)) == (5, 2)
    assert data.val[1][0].shape == (3, 64, 64)
    assert data.val[1][1] == 1


def test_separate_folders_and_training_without_evaluation(tmp_path):
    write_images(tmp_path / "a", {"ant": 1, "bee": 1})
    write_images(tmp_path / "b", {"ant": 2, "bee": 2})
    config = DataConfig("image_folder", str(tmp_path / "a"), str(tmp_path / "b"))
    data = build_data(config, AugmentConfig(), 64)
    assert (len(data.train), len(data.val)) == (2, 4)
    only_train = DataConfig("image_folder", str(tmp_path / "a"))
    assert build_data(only_train, AugmentConfig(), 64, with_val=False).val is None
    with pytest.raises(UserError, match="eval_data_path"):
        build_data(only_train, AugmentConfig(), 64)


def test_training_without_val_takes_the_train_folder(tmp_path):
    write_images(tmp_path / "train", {"ant": 2, "bee": 3})
    config = DataConfig("image_folder", str(tmp_path))
    assert build_data(config, AugmentConfig(), 64, with_val=False).classes == ["ant", "bee"]
    with pytest.raises(UserError, match="does not hold both train/ and val/"):
        build_data(config, AugmentConfig(), 64)


def test_max_images_are_spread_evenly(tmp_path):
    write_images(tmp_path, {"ant": 10, "bee": 10, "cow": 10})
    config = DataConfig("image_folder", str(tmp_path), max_images=6)
    data = build_data(config, AugmentConfig(), 64, with_train=False)
    assert [data.val[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    data.val.whole.needs_fork = True
    assert spread_evenly(data.val.whole, 2).needs_fork


def test_first_of_several_names_of_a_class():
    """torchvision's ImageNet maps each synonym to its class."""

    class Synonyms:
        class_to_idx = {"tench": 0, "Tinca tinca": 0, "goldfish": 1}

    assert _class_names(Synonyms()) == ["tench", "goldfish"]


def parts(data):
    return ("train", data.train), ("val", data.val)


def test_held_out_share_of_a_train_folder_and_of_none(tmp_path):
    write_images(tmp_path / "train", {"ant": 4, "bee": 4})
    config = DataConfig("image_folder", str(tmp_path), val_fraction=0.25)
    data = build_data(config, AugmentConfig(), 64)
    assert (len(data.train), len(data.val)) == (6, 2)
    write_images(tmp_path / "val", {"ant": 3, "bee": 3})
    data = build_data(config, AugmentConfig(), 64)
    assert (len(data.train), len(data.val)) == (8, 6)


def test_too_few_images_to_hold_one_out(tmp_path):
    write_images(tmp_path, {"ant": 4, "bee": 1})
    config = DataConfig("image_folder", str(tmp_path), val_fraction=0.2)
    with pytest.raises(UserError, match="bee has 1 image.*none for training"):
        build_data(config, AugmentConfig(), 64)


def test_one_class_is_too_few_to_train(tmp_path):
    write_images(tmp_path, {"ant": 2})
    with pytest.raises(UserError, match="a single class, ant"):
        build_data(DataConfig("image_folder", str(tmp_path)), AugmentConfig(), 64, with_val=False)


def test_other_images_are_no_digits(tmp_path):
    write_images(tmp_path / "val", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match="other images than digits"):
        build_data(DataConfig("digits", str(tmp_path)), AugmentConfig(), 64, with_train=False)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (None, {"a": 1}, "is not a folder"),
        ({"a": 1}, None, "is not a folder"),
        ({}, {"a": 1}, "one folder of images per class"),
        ({"a": 0}, {"a": 1}, "one folder of images per class"),
        (
            {"a": 1, "b": 1},
            {"a": 1, "c": 1},
            "different classes: only in training b, only in evaluation c",
        ),
    ],
)
def test_broken_folders_end_in_one_line(tmp_path, train, val, message):
    for name, counts in (("train", train), ("val", val)):
        if counts is not None:
            (tmp_path / name).mkdir()
            write_images(tmp_path / name, counts)
    config = DataConfig(
        "image_folder", str(tmp_path / "train"), eval_data_path=str(tmp_path / "val")
    )
    with pytest.raises(UserError, match=message) as caught:
        build_data(config, AugmentConfig(), 64)
    assert "\n" not in str(caught.value)


def test_class_folders_of_ones_own_are_told_from_imagenet(tmp_path):
    write_images(tmp_path, {"ant": 1, "bee": 1})
    for with_train, part in ((True, "train"), (False, "val")):
        with pytest.raises(UserError, match=f"no folder {part}/: .*--data_set image_folder"):
            build_data(DataConfig("IMNET", str(tmp_path)), AugmentConfig(), 64, with_train)


def test_imagenet_has_1000_classes(tmp_path):
    write_images(tmp_path / "val", {"n01440764": 1, "n01443537": 1})
    with pytest.raises(UserError, match="2 classes, ImageNet-1K has 1000"):
        build_data(DataConfig(data_path=str(tmp_path)), AugmentConfig(), 64, with_train=False)


def test_unreadable_image_names_the_file(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    with pytest.raises(UserError, match=r"broken.png cannot be read"):
        load_image(str(path))


def test_evaluation_view_below_384_is_a_centre_crop_of_the_short_side():
    # a 256 x 512 image whose columns are numbered: the crop of 224 shows the middle unscaled
    columns = np.broadcast_to(np.arange(512) // 2, (256, 512)).astype(np.uint8)
    view = eval_transform(224, ZERO, ONE)(Image.fromarray(np.stack([columns] * 3, -1)))
    assert view.shape == (3, 224, 224)
    np.testing.assert_allclose(view[0, 0].numpy() * 255, columns[0, 144:368], atol=1e-4)


def test_evaluation_view_from_384_warps_the_whole_image():
    image = np.zeros((384, 768, 3), np.uint8)
    image[:, 384:] = 255
    view = eval_transform(384, ZERO, ONE)(Image.fromarray(image))
    assert view.shape == (3, 384, 384)
    assert view[:, :, :188].abs().max() < 0.02
    assert view[:, :, 196:].min() > 0.98


def test_crop_pct_sets_the_margin():
    image = Image.fromarray(np.full((200, 100, 3), 255, np.uint8))
    resize = eval_transform(100, ZERO, ONE, crop_pct=0.5).transforms[0]
    assert min(resize(image).size) == 200


def plain():
    return AugmentConfig(aa=None, color_jitter=0.0, reprob=0.0, hflip=0.0)


def test_small_inputs_are_shifted_not_rescaled():
    image = np.zeros((32, 32, 3), np.uint8)
    image[14:18, 14:18] = 255
    transform = train_transform(plain(), 32, ZERO, ONE)
    positions = set()
    for _ in range(60):
        view = transform(Image.fromarray(image))
        assert view.shape == (3, 32, 32)
        assert view[0].sum() == 16  # the mark keeps its size
        positions.add(tuple(view[0].nonzero()[0].tolist()))
    rows = [row for row, _ in positions]
    assert min(rows) >= 10
    assert max(rows) <= 18
    assert len(positions) > 20


def test_small_inputs_of_another_size_are_resized():
    transform = train_transform(plain(), 28, ZERO, ONE)
    assert transform(Image.new("RGB", (100, 60))).shape == (3, 28, 28)


def test_flip_and_scale_flags():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    always = replace(plain(), scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0)
    view = train_transform(always, 32, ZERO, ONE)(Image.fromarray(image))
    assert view[0, :, 16:].min() > 0.98
    assert view[0, :, :16].max() < 0.02


def test_bad_policy_is_one_line():
    with pytest.raises(UserError, match="--aa nonsense"):
        train_transform(AugmentConfig(aa="nonsense"), 64, ZERO, ONE)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "v0", "original"])
def test_policies_posterize_to_0_bits_as_older_pillows_did(policy):
    transform = train_transform(AugmentConfig(aa=policy), 32, ZERO, ONE)
    member = next(t for t in transform.transforms if hasattr(t, "ops") or hasattr(t, "policy"))
    ops = getattr(member, "ops", []) or sum(member.policy, [])
    posterize = [op for op in ops if op.name.startswith("Posterize")]
    assert posterize
    for op in posterize:
        image = Image.new("RGB", (4, 4), (255, 130, 7))
        assert np.array(op.aug_fn(image, 0)).max() == 0
        assert np.array(op.aug_fn(image, 1))[0, 0].tolist() == [128, 128, 0]


def test_augmentation_flags_reach_the_transform():
    config = AugmentConfig(
        scale=(0.3, 0.7),
        ratio=(0.5, 2.0),
        hflip=0.3,
        aa=None,
        color_jitter=0.25,
        train_interpolation="bilinear",
        reprob=0.4,
        remode="const",
        recount=3,
    )
    transform = train_transform(config, 64, ZERO, ONE)
    members = {type(t).__name__: t for t in transform.transforms}
    crop, erase = members["RandomResizedCropAndInterpolation"], transform.finish.erasing
    assert (crop.scale, crop.ratio) == ((0.3, 0.7), (0.5, 2.0))
    assert "bilinear" in str(crop)
    assert members["RandomHorizontalFlip"].p == 0.3
    assert members["ColorJitter"].brightness == (0.75, 1.25)
    assert (erase.probability, erase.max_count) == (0.4, 3)
    assert (erase.rand_color, erase.per_pixel) == (False, False)
    assert "RandAugment" not in members


def test_mean_and_deviation(tmp_path):
    write_images(tmp_path / "val", {"a": 1})
    for imagenet, expected in ((True, -0.485 / 0.229), (False, -1.0)):
        config = DataConfig("image_folder", str(tmp_path), imagenet_default_mean_and_std=imagenet)
        data = build_data(config, AugmentConfig(), 64, with_train=False)
        loader = eval_loader(data.val, replace(config, num_workers=0), context(), NO_BAD)
        assert next(iter(loader))[0][0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shards_hold_each_image_once(length, world_size):
    shards = [shard(length, 2, rank, world_size) for rank in range(world_size)]
    assert sorted(sum(shards, [])) == list(range(length))
    assert max(map(len, shards)) - min(map(len, shards)) <= 2


NO_BAD = UnreadableImages(Path("there_is_none.txt"), 0)


class Numbers(ImageSet):
    labels = transform = None

    def __init__(self):
        pass

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return torch.tensor(index), 0


def images_of(batches):
    return [images for images, _ in batches]


def test_loaders_batch_sizes_and_shares():
    config = DataConfig(batch_size=4, num_workers=0, pin_mem=False)
    batches = images_of(eval_loader(Numbers(), config, context(), NO_BAD))
    assert [len(batch) for batch in batches] == [6, 6, 6, 4]
    both = [TrainLoader(Numbers(), config, context(rank, 2), NO_BAD) for rank in range(2)]
    whole = TrainLoader(Numbers(), DataConfig(batch_size=8, num_workers=0), context(), NO_BAD)
    for position in (0, 8):
        shares = [images_of(loader.batches(1, position)) for loader in both]
        joined_batches = images_of(whole.batches(1, position))
        assert len(joined_batches) == (22 - position) // 8
        for left, right, joined in zip(*shares, joined_batches, strict=True):
            assert len(left) == len(right) == 4
            assert sorted([*left.tolist(), *right.tolist()]) == sorted(joined.tolist())


def test_more_workers_than_cores_are_told_once(caplog, recwarn, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    _tell_of_cores.cache_clear()
    for workers in (1, 2):
        config = DataConfig(num_workers=workers)
        iter(TrainLoader(Numbers(), config, context(), NO_BAD).loader)
        iter(eval_loader(Numbers(), config, context(), NO_BAD))
    assert [record.args for record in caplog.records] == [(2, 1)]
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_an_epoch_goes_on_with_the_very_next_images():
    """In any number of processes: position counts the images of all of them."""
    loader = TrainLoader(Numbers(), DataConfig(batch_size=2, num_workers=0), context(), NO_BAD, 3)
    order = [i for batch in images_of(loader.batches(4, 0)) for i in batch.tolist()]
    assert sorted(order) == list(range(22))
    for world_size in (1, 2, 3):
        config = DataConfig(batch_size=2, num_workers=0)
        both = [
            TrainLoader(Numbers(), config, context(r, world_size), NO_BAD, 3)
            for r in range(world_size)
        ]
        rest = [images_of(loader.batches(4, 6)) for loader in both]
        used = [i for step in zip(*rest, strict=False) for batch in step for i in batch.tolist()]
        whole_steps = 16 // (2 * world_size) * 2 * world_size
        assert sorted(used) == sorted(order[6 : 6 + whole_steps])


class Random(Numbers):
    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), 0


class Labelled(Numbers):
    """22 images of class 0, then of classes 1 and 3."""

    labels = torch.tensor([0] * 15 + [1] * 6 + [3], dtype=torch.int32)


def orders(images, epochs, **flags):
    order = EpochOrder(images, 0, context(), SamplingConfig(**flags))
    for order.epoch in range(epochs):
        yield order.of_all_ranks()


def test_balanced_classes():
    """The same number of images of each class with images; all images of a class alike often."""
    drawn = torch.stack([*orders(Labelled(), 2000, class_balanced=True)])
    counts = torch.nn.functional.one_hot(Labelled.labels.long()[drawn]).sum(1)
    assert {*map(tuple, counts[:, [0, 1, 3]].sort(dim=1).values.tolist())} == {(7, 7, 8)}
    # a count of n draws, each with probability p, has the variance np(1 - p)
    for images, share in ((range(15), 1 / 15), (range(15, 21), 1 / 6), ([21], 1)):
        numbers = torch.tensor([(drawn == i).sum() for i in images])
        expected = 2000 * 22 / 3 * share
        assert (numbers - expected).abs().max() < 5 * (expected + 1) ** 0.5
    assert not torch.equal(drawn[0], drawn[1])
    for order in orders(Labelled(), 20, class_balanced=True, aug_repeats=2):
        counts = torch.bincount(Labelled.labels[order])[[0, 1, 3]]
        assert counts.sum() == 22
        assert counts.max() - counts.min() <= 2
    # the classes are mixed, not one after another
    assert len({*Labelled.labels[drawn[0, :8]].tolist()}) > 1
    with pytest.raises(UserError, match="--class_balanced: the labels"):
        next(orders(Numbers(), 1, class_balanced=True))


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_is_timms(repeats):
    for epoch, order in enumerate(orders(Numbers(), 3, aug_repeats=repeats)):
        theirs = RepeatAugSampler(range(22), 1, 0, num_repeats=repeats, selected_round=0)
        theirs.set_epoch(epoch)
        assert order.tolist() == [int(i) for i in theirs]


def test_views_of_one_image_differ_and_a_run_goes_on_with_them():
    config = DataConfig(batch_size=2, num_workers=0)
    images, sampling = Random(), SamplingConfig(aug_repeats=2)
    loader = TrainLoader(images, config, context(), NO_BAD, 0, sampling)
    values = torch.cat(images_of(loader.batches(0, 0)))
    assert len({*values.flatten().tolist()}) == 66
    assert torch.equal(values[6:], torch.cat(images_of(loader.batches(0, 6))))
    ranks = [TrainLoader(images, config, context(r, 2), NO_BAD, 0, sampling) for r in range(2)]
    shares = [torch.cat(images_of(loader.batches(0, 0))) for loader in ranks]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), values[:20])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_augmentation_follows_from_seed_epoch_and_image(workers):
    def values(seed, epoch, position=0):
        config = DataConfig(batch_size=2, num_workers=workers, pin_mem=False)
        loader = TrainLoader(Random(), config, context(), NO_BAD, seed)
        return torch.cat(images_of(loader.batches(epoch, position)))

    first = values(0, 0)
    assert torch.equal(first[8:], values(0, 0, 8))
    by_hand = TrainLoader(Random(), DataConfig(batch_size=2, num_workers=0), context(), NO_BAD, 0)
    assert torch.equal(first, torch.cat(images_of(by_hand.batches(0, 0))))
    for other in (values(1, 0), values(0, 1)):
        assert not set(first.flatten().tolist()) & set(other.flatten().tolist())
    assert len(set(first.flatten().tolist())) == 66


class Processes(Numbers):
    def __getitem__(self, index):
        values = [random.random(), os.getpid(), gc.get_freeze_count()]
        return torch.tensor(values, dtype=torch.float64), 0


@pytest.mark.parametrize(
    "method",
    ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))],
)
def test_workers_live_through_epochs(method):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        config = DataConfig(batch_size=2, num_workers=2, pin_mem=False)
        loader = TrainLoader(Processes(), config, context(), NO_BAD)
        next(loader.batches(0, 0))  # an epoch that is left early
        epochs = [
            torch.cat(images_of(loader.batches(*place))) for place in ((0, 0), (1, 0), (1, 8))
        ]
    finally:
        multiprocessing.set_start_method(before, force=True)
    pids = [set(epoch[:, 1].tolist()) for epoch in epochs]
    assert pids[0] == pids[1] == pids[2]
    assert len(pids[0]) == 2
    assert os.getpid() not in pids[0]
    assert epochs[0][:, 2].min() > 0  # garbage collection does not copy the parent's objects
    by_hand = TrainLoader(Processes(), replace(config, num_workers=0), context(), NO_BAD)
    for values, place in zip(epochs, ((0, 0), (1, 0), (1, 8)), strict=True):
        assert torch.equal(values[:, 0], torch.cat(images_of(by_hand.batches(*place)))[:, 0])


def test_order_follows_epoch_and_seed():
    config = DataConfig(batch_size=22, num_workers=0, pin_mem=False)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        loader = TrainLoader(Numbers(), config, context(), NO_BAD, seed)
        orders.append(next(loader.batches(epoch, 0))[0].tolist())
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_evaluation_not_shared_shows_all_images_to_each_process():
    config = DataConfig(batch_size=4, num_workers=0, pin_mem=False)
    loader = eval_loader(Numbers(), config, context(1, 2), NO_BAD, dist_eval=False)
    assert sum(len(images) for images, _ in loader) == 22


def test_the_device_takes_the_last_steps():
    """Bytes go there; the inputs are those of torchvision's steps, the erased ones timm's."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 48, 3), np.uint8))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    view = eval_transform(32, mean, std)
    part = view.for_batch(image)
    assert (part.dtype, part.shape) == (torch.uint8, (3, 32, 32))
    steps = [transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC)]
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    expected = transforms.Compose(steps)(image)
    assert torch.equal(view.finish(torch.stack([part, part])), torch.stack([expected] * 2))
    assert torch.equal(view(image), expected)
    augment = replace(plain(), reprob=1.0, remode="pixel")
    finish = train_transform(augment, 32, mean, std).finish
    seed_host(5)
    found = finish(torch.stack([part, part]))
    seed_host(5)
    erased = torch.stack([expected] * 2)
    RandomErasing(1.0, mode="pixel", device="cpu")(erased)
    assert torch.equal(found, erased)
    assert not torch.equal(found[0], found[1])


def test_erasing_follows_from_seed_epoch_batch_and_rank(tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for index in range(4):  # all the same, so that only the noise differs
            Image.new("RGB", (32, 32)).save(tmp_path / "train" / label / f"{index}.png")
    config = DataConfig("image_folder", str(tmp_path), batch_size=2, num_workers=0)
    data = build_data(config, replace(plain(), reprob=1.0, remode="pixel"), 32, with_val=False)

    def batches(seed=0, rank=0, epoch=0, position=0):
        loader = TrainLoader(data.train, config, context(rank, 2), NO_BAD, seed)
        return torch.stack(images_of(loader.batches(epoch, position)))

    first = batches()
    assert torch.equal(first[1:], batches(position=4))
    others = batches(seed=1)[0], batches(rank=1)[0], batches(epoch=1)[0], first[1]
    assert not any(torch.equal(first[0], other) for other in others)


def test_mixup_makes_smoothed_soft_targets():
    assert build_mixup(MixupConfig(mixup=0, cutmix=0), 5) is None
    mixup = build_mixup(MixupConfig(mixup=0.8, cutmix=0.0), 5)
    assert mixup is not None
    config = MixupConfig(0.2, 0.3, (0.1, 0.9), 0.4, 0.6, "elem")
    built = build_mixup(config, 5)
    assert (built.mixup_alpha, built.cutmix_minmax) == (0.2, (0.1, 0.9))
    assert (built.mix_prob, built.switch_prob, built.mode) == (0.4, 0.6, "elem")
    _, targets = mixup(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() == pytest.approx(0.1 / 5)


def test_digits_are_written_once_and_whole(tmp_path):
    folder = tmp_path / "deep" / "digits"
    write_digits(folder)
    files = {part: sorted((folder / part).rglob("*.png")) for part in ("train", "val")}
    assert {part: len(found) for part, found in files.items()} == {"train": 1437, "val": 360}
    assert not {f.name for f in files["train"]} & {f.name for f in files["val"]}
    assert Image.open(files["val"][0]).size == (32, 32)
    (folder / "mark").touch()
    write_digits(folder)
    assert (folder / "mark").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def image_files(folder, count=6):
    """Two classes of `count` images each, the second one's brighter."""
    for label, value in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 40), (value + index,) * 3).save(folder / label / f"{index}.png")
    return folder


def whole_image(path):
    return ListedImages(list_classes(path), transforms.ToTensor())


SPOIL = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", SPOIL)
def test_an_unreadable_image_is_replaced_by_one_of_its_class(tmp_path, how, workers):
    dataset = whole_image(image_files(tmp_path / "images"))
    for name in ("dark/0.png", "dark/3.png", "light/5.png"):
        SPOIL[how](tmp_path / "images" / name)
    bad = UnreadableImages(tmp_path / "bad_images.txt", 3)
    config = DataConfig(batch_size=12, num_workers=workers, pin_mem=False)
    loader = TrainLoader(dataset, config, context(), bad)
    for epoch in (0, 1):
        images, labels = next(loader.batches(epoch, 0))
        assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
        bright = images.mean((1, 2, 3)) > 0.5
        assert torch.equal(bright.long(), labels)
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    names = sorted(line.split("\t")[0] for line in lines)
    folder = tmp_path / "images"
    assert names == [str(folder / n) for n in ("dark/0.png", "dark/3.png", "light/5.png")]
    assert all("cannot be read" in line for line in lines)


def test_unreadable_images_do_not_count_in_an_evaluation(tmp_path):
    dataset = whole_image(image_files(tmp_path / "images"))
    (tmp_path / "images/dark/0.png").write_bytes(b"")
    bad = UnreadableImages(tmp_path / "bad_images.txt", 1)
    config = DataConfig(batch_size=4, num_workers=0, pin_mem=False)

    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images):  # everything is dark
            return torch.stack((images.mean((1, 2, 3)) * 0 + 1, images.mean((1, 2, 3)) * 0), 1)

    # a blank one takes the place of the other, whose size the batch would not fit otherwise
    dataset.transform = transforms.Compose([transforms.Resize((40, 40)), transforms.ToTensor()])
    metrics, _ = evaluate(Says(), eval_loader(dataset, config, context(), bad), context())
    assert (metrics["images"], metrics["unreadable"]) == (11, 1)
    assert metrics["acc1"] == pytest.approx(100 * 5 / 11)


def test_too_many_unreadable_images_end_the_run(tmp_path):
    dataset = whole_image(image_files(tmp_path / "images"))
    for index in range(3):
        (tmp_path / f"images/dark/{index}.png").write_bytes(b"")
    config = DataConfig(batch_size=12, num_workers=0)
    loader = TrainLoader(dataset, config, context(), UnreadableImages(tmp_path / "bad.txt", 2))
    with pytest.raises(UserError, match=r"3 images cannot be read, more than --max_bad_images 2"):
        next(loader.batches(0, 0))
    for path in (tmp_path / "images/light").iterdir():
        path.write_bytes(b"")
    loader = TrainLoader(dataset, config, context(), UnreadableImages(tmp_path / "all.txt", 100))
    with pytest.raises(UserError, match="neither .*light/.*.png nor another image of its class"):
        next(loader.batches(0, 0))


def test_images_of_all_kinds(tmp_path):
    """What a value is stored as does not change what it shows."""
    level = 180
    plain = Image.new("RGB", (8, 6), (level,) * 3)
    plain.save(tmp_path / "a.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((6, 8), level * 257, np.uint16)).save(tmp_path / "sixteen.png")
    plain.convert("L").save(tmp_path / "grey.png")
    plain.convert("RGBA").save(tmp_path / "alpha.png")
    plain.quantize(4).save(tmp_path / "palette.png")
    plain.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    Image.new("RGB", (20_000, 10), (level,) * 3).save(tmp_path / "wide.png")
    for path in tmp_path.iterdir():
        image = load_image(str(path))
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image), level, atol=2)


def test_an_image_of_too_many_pixels_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is too large"):
        load_image(str(tmp_path / "a.png"))


def test_an_image_like_a_thread_is_unreadable(tmp_path):
    for width, height in ((8000, 2), (2, 8001)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{width}.png")
    assert load_image(str(tmp_path / "8000.png")).size == (8000, 2)
    with pytest.raises(UserError, match=r"2\.png cannot be read: one side of 2 x 8001 pixels"):
        load_image(str(tmp_path / "2.png"))


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg cannot be read: not a regular file"):
        load_image(str(tmp_path / "pipe.jpg"))


def test_an_image_that_several_processes_have_noted_counts_once(tmp_path, caplog):
    path = tmp_path / "bad.txt"
    path.write_text("a\tx\na\tx\nb\tx\n")
    UnreadableImages(path, 3).add("c", "x")
    bad = UnreadableImages(tmp_path / "new.txt", 3)
    bad.tell()
    bad.add("e", "image e cannot be read: why")
    bad.add("e", "again")
    bad.add("f", "why")
    assert caplog.text.count("image e cannot be read: why; it is listed in") == 1
    bad.tell()
    assert caplog.text.count("unreadable images until now: 2; see") == 1
    assert len(caplog.records) == 2
    with pytest.raises(UserError, match="4 images cannot be read, more than .* 3: b, c, d; see"):
        UnreadableImages(path, 3).add("d", "x")


def test_an_unreadable_image_of_a_torch_folder(tmp_path):
    folder = image_files(tmp_path)
    (folder / "dark/2.png").write_bytes(b"no image")
    config = DataConfig(data_set="torch/image_folder", data_path=str(folder))
    dataset = build_data(config, AugmentConfig(), 32, with_val=False).train
    with pytest.raises(UserError, match=r"dark/2\.png cannot be read"):
        [dataset[index] for index in range(len(dataset))]


def test_damaged_tar(tmp_path):
    folder = image_files(tmp_path / "images")
    (folder / "dark/2.png").write_bytes(b"no image")
    (tmp_path / "tars/train").mkdir(parents=True)
    with tarfile.open(tmp_path / "tars/train/all.tar", "w") as tar:
        tar.add(folder, ".")
    config = DataConfig(
        data_set="tar", data_path=str(tmp_path / "tars"), batch_size=12, num_workers=0
    )
    dataset = build_data(config, AugmentConfig(), 32, with_val=False).train
    bad = UnreadableImages(tmp_path / "bad.txt", 1)
    _, labels = next(TrainLoader(dataset, config, context(), bad).batches(0, 0))
    assert len(labels) == 12
    assert "dark/2.png" in (tmp_path / "bad.txt").read_text()


@pytest.mark.parametrize("size", [32, 224, 384])
def test_the_area_of_several_crops_has_the_usual_view_in_its_middle(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 375, 3), np.uint8))
    mean_std = ((0.5,) * 3, (0.5,) * 3)
    whole = eval_transform(size, *mean_std, crops=True)(image)
    side = int(size * 256 / 224)
    assert whole.shape == (3, side, side)
    if size == 224:  # others are warped, to another scale
        centre = transforms.CenterCrop(size)(whole)
        torch.testing.assert_close(centre, eval_transform(size, *mean_std)(image))


def test_sizes_by_epoch(tmp_path):
    """Of all workers, and of a part of a set; evaluation has the full size."""
    write_drawings(tmp_path, 4)
    config = DataConfig("image_folder", str(tmp_path), val_fraction=0.3, batch_size=2)
    augment = AugmentConfig(size_schedule=("40@0", "64@2"))
    data = build_data(config, augment, 64)
    for workers in (0, 2):
        loader = TrainLoader(data.train, replace(config, num_workers=workers), context(), NO_BAD)
        sizes = [next(loader.batches(epoch, 0))[0].shape[2:] for epoch in range(4)]
        assert sizes == [(40, 40), (40, 40), (64, 64), (64, 64)]
    assert data.val[0][0].shape == (3, 64, 64)
    # a constant size is what there was before
    plain = build_data(config, AugmentConfig(), 64)
    batches = [next(TrainLoader(d.train, replace(config, num_workers=0), context(), NO_BAD)
               .batches(2, 0))[0] for d in (data, plain)]  # fmt: skip
    assert torch.equal(*batches)


def test_three_augment():
    """Solarize, grey or blur, and colour jitter (https://arxiv.org/abs/2204.07118)."""
    transform = train_transform(
        AugmentConfig(aa="3a", color_jitter=0.3), 64, (0.5,) * 3, (0.5,) * 3
    )
    kinds = [type(member).__name__ for member in transform.transforms]
    assert kinds[2:4] == ["AutoAugment", "ColorJitter"]
    assert [op.name for (op,) in transform.transforms[2].policy] == [
        "Solarize", "Desaturate", "GaussianBlurRand",
    ]  # fmt: skip

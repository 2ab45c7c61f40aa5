"""Repeats recorded facts of P2P and prints how far this project strays from them.

python -m tests.golden.point_clouds tests/golden/p2p

The folder holds views.npz, projection.npz, prompt.npz, model.npz, train_step.npz, vote.npz and
data_and_schedule.npz, or some of them; weights come from `tests.golden.formula`. The recorded files
in p2p/ were made by the published modules (wangzy22/P2P, commit 8530757) on a CPU, in float32.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import models
from config.command_line import parse_args
from optim_factory import Schedule, create_optimizer
from point_clouds import projection, sampling
from point_clouds.p2p import P2P, Encoder
from tests.golden.formula import fill_by_formula

EXACT, IMAGE, LOGITS, MATRIX = 0.0, 1e-4, 1e-5, 1e-6
KINKED, SMOOTH = 1e-2, 1e-4
"""Of gradients, relative to the largest entry: before img_layer rounding may switch a branch."""

Record = dict[str, np.ndarray]
Differences = dict[str, tuple[float, float]]
"""What -> (largest difference, tolerance)."""


def differences(folder: Path, *names: str) -> Differences:
    """Compare with the records in a folder, or with those of these names only."""
    found: Differences = {}
    for name, check in CHECKS.items():
        if (not names or name in names) and (folder / f"{name}.npz").is_file():
            with np.load(folder / f"{name}.npz", allow_pickle=False) as record:
                found |= {f"{name} {k}": v for k, v in check(dict(record)).items()}
    return found


def _cases(record: Record) -> dict[str, Record]:
    """Return the entries of each case: 'p0_obj_size' is obj_size of p0."""
    cases: dict[str, Record] = {}
    for name, value in record.items():
        case, _, rest = name.partition("_")
        cases.setdefault(case, {})[rest] = value
    return cases


def _views(record: Record) -> Differences:
    theta, phi = math.pi * _tensor(record["angles_over_pi"]).T
    matrices = projection.view_matrices(theta, phi).float()
    rotated = projection.rotate(_tensor(record["cloud"]), matrices)
    return {
        "matrices": (_far(matrices, record["matrices"]), MATRIX),
        "rotated": (_far(rotated, record["rotated"]), MATRIX),
        "test views": (_far(projection.test_views(), record["test_matrices"]), MATRIX),
        "validation views": (_far(projection.validation_views(), record["val_matrices"]), MATRIX),
    }


def _projection(record: Record) -> Differences:
    found: Differences = {}
    for name, case in _cases(record).items():
        size = int(case["obj_size"])
        centres = projection.centre_pixels(_tensor(case["rotated"]), size)
        found[f"{name} pixels"] = (_far(centres, case["centre_pixel"]), EXACT)
        counts = projection.splat(torch.ones(*centres.shape[:2], 1), centres, size)[:, 0]
        found[f"{name} largest count"] = (_far(counts.amax((1, 2)), case["count_max"]), EXACT)
        covered = (counts > 0).sum((1, 2))
        found[f"{name} covered pixels"] = (_far(covered, case["covered_pixels"]), EXACT)
        if "count_map" in case:
            found[f"{name} counts"] = (_far(counts, case["count_map"]), EXACT)
    return found


def _prompt(record: Record) -> Differences:
    found: Differences = {}
    for name, case in _cases(record).items():
        obj_size, img_size, k = (int(case[key]) for key in ("obj_size", "img_size", "k"))
        named: Any = nn.Module()  # names of weights begin with "enc."
        enc = named.enc = Encoder(obj_size, img_size, k, trans_dim=8, graph_dim=64)
        fill_by_formula(named.eval())
        rotated = _tensor(case["rotated"])
        centres = projection.centre_pixels(rotated, enc.obj_size)
        with torch.no_grad():
            features = enc.point_features(_tensor(case["cloud"]))
            image = enc.image(features, rotated)
        found[f"{name} pixels"] = (_far(centres, case["centre_pixel"]), EXACT)
        every4 = _far(features[:, ::4], case["point_features_every4"])
        found[f"{name} point features"] = (every4, IMAGE)
        found[f"{name} image"] = (_far_image(image, case), IMAGE)
    return found


def _model(record: Record) -> Differences:
    found: Differences = {}
    for name, case in _cases(record).items():
        model = _p2p(case, str(case["head"])).eval()
        cloud, rotated = _tensor(case["cloud"]), _tensor(case["rotated"])
        with torch.no_grad():
            image = model.enc.image(model.enc.point_features(cloud), rotated)
            logits = model(torch.stack((cloud, rotated), dim=1))
        labels = _tensor(case["labels"])
        smoothed = _loss(logits, labels, smoothing_for(logits.shape[1]))
        found[f"{name} image"] = (_far_image(image, case), IMAGE)
        found[f"{name} logits"] = (_far(logits, case["logits"]), LOGITS)
        found[f"{name} loss"] = (_far(_loss(logits, labels), case["loss_plain"]), LOGITS)
        found[f"{name} smoothed loss"] = (_far(smoothed, case["loss_smoothed"]), LOGITS)
    return found


def _train_step(record: Record) -> Differences:
    model = _p2p(record).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    clouds = torch.stack((_tensor(record["cloud"]), _tensor(record["rotated"])), dim=1)
    flags = ["--weight_decay", "0.05", "--decay_1d", "true"]
    optimizer = create_optimizer(parse_args(flags).optim, model, lr=5e-4)
    logits = model(clouds)
    loss = _loss(logits, _tensor(record["labels"]), smoothing_for(logits.shape[1]))
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = record["trainable_names"].tolist()
    found: Differences = {
        "logits": (_far(logits.detach(), record["logits"]), LOGITS),
        "loss": (_far(loss.detach(), record["loss"]), LOGITS),
        "trained names": (float(len(set(names) ^ trained.keys())), EXACT),
    }
    for name, norm in zip(names, record["grad_norms"], strict=True):
        gradient: Any = trained[name].grad
        far = abs(gradient.norm().item() - float(norm)) / float(norm)
        found[f"gradient norm of {name}"] = (far, _gradient_tolerance(name))
    for key in record:
        kind, _, name = key.partition(":")
        if kind == "grad":
            gradient = trained[name].grad
            far = _far(gradient.reshape(record[key].shape), record[key]) / abs(record[key]).max()
            found[f"gradient of {name}"] = (far, _gradient_tolerance(name))
    optimizer.step()
    state = model.state_dict()
    for key in record:
        kind, _, name = key.partition(":")
        if kind == "after":
            # AdamW's first step has the size of the learning rate, whatever the gradient's
            found[f"{name} after a step"] = (_far(state[name], record[key]), LOGITS)
    moved = sum(int((state[n] != p).any()) for n, p in frozen.items())
    found["frozen parameters that moved"] = (float(moved), EXACT)
    return found


def _gradient_tolerance(name: str) -> float:
    return KINKED if name.startswith("enc.") and "img_layer" not in name else SMOOTH


def _vote(record: Record) -> Differences:
    model, cloud = _p2p(record).eval(), _tensor(record["cloud"])
    first = projection.rotate(cloud, projection.test_views()[0])
    with torch.no_grad():
        single = model(cloud).unflatten(0, (len(cloud), -1)).transpose(0, 1)
        model.vote = True
        voted = model(cloud)
    return {
        "rotated": (_far(first, record["rotated_first"]), MATRIX),
        "logits of single views": (_far(single, record["logits_8_val_views"]), LOGITS),
        "voted logits": (_far(voted, record["logits_voted"]), LOGITS),
    }


def _data_and_schedule(record: Record) -> Differences:
    found: Differences = {}
    stored = (sampling.to_unit_sphere(cloud[:, :3]) for cloud in record["modelnet_stored"])
    own = np.stack([sampling.upright(cloud) for cloud in stored])
    found["ModelNet40 sample"] = (_far(own, record["modelnet_sample"]), MATRIX)
    own = np.stack([sampling.upright(cloud[:, :3]) for cloud in record["scanobjectnn_stored"]])
    found["ScanObjectNN sample"] = (_far(own, record["scanobjectnn_sample"]), EXACT)
    for number in range(sum(name.endswith("_index") for name in record)):
        cloud, index = record[f"fps{number}_cloud"], record[f"fps{number}_index"]
        wrong = sampling.farthest_points(cloud, len(index)) != index
        found[f"farthest points {number}"] = (float(wrong.sum()), EXACT)
    np.random.seed(int(record["augment_numpy_seed"]))
    stretched = torch.stack([sampling.stretch(_tensor(cloud)) for cloud in record["augment_in"]])
    found["augmentation"] = (_far(stretched, record["augment_out"]), MATRIX)
    for classes in (40, 15):
        logits, labels = (_tensor(record[f"loss{classes}_{n}"]) for n in ("logits", "labels"))
        loss = _loss(logits, labels, smoothing_for(classes))
        found[f"loss of {classes} classes"] = (
            _far(loss, record[f"loss{classes}_smoothed"]), LOGITS
        )  # fmt: skip
    flags = ["--epochs", str(len(record["lr_per_epoch"])), "--lr", "5e-4", "--min_lr", "1e-6"]
    flags += ["--warmup_epochs", "0", "--schedule_unit", "epoch"]
    schedule = Schedule(parse_args(flags).schedule, 0.05, steps_per_epoch=7)
    rates = [schedule.learning_rate(step) for step in range(7 * len(record["lr_per_epoch"]))]
    recorded = record["lr_per_epoch"].repeat(7)
    found["learning rates, relative"] = (float(np.max(np.abs(rates / recorded - 1))), 1e-9)
    return found


CHECKS: dict[str, Callable[[Record], Differences]] = {
    "views": _views,
    "projection": _projection,
    "prompt": _prompt,
    "model": _model,
    "train_step": _train_step,
    "vote": _vote,
    "data_and_schedule": _data_and_schedule,
}


def _p2p(case: Record, head: str = "linear") -> P2P:
    variant = str(case["variant"])
    model: Any = timm.create_model(
        "p2p",
        backbone=variant,
        num_classes=int(case["classes"]),
        head=head,
        obj_size=int(case["obj_size"]),
    )
    models.accelerate(fill_by_formula(model))  # as it is trained
    return model


def _loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def _far_image(image: Tensor, case: Record) -> float:
    """Return the largest difference of an image, or of what is recorded of it."""
    own = {
        "image": image,
        "image_strided": image[:, :, 3::8, 5::8],
        "image_row_mean": image.mean(dim=3),
        "image_col_mean": image.mean(dim=2),
        "image_channel_std": image.flatten(2).std(dim=2, correction=0),
    }
    return max(_far(value, case[name]) for name, value in own.items() if name in case)


def smoothing_for(classes: int) -> float:
    """Return torch's label smoothing for P2P's, 0.2 for all wrong classes together."""
    return 0.2 * classes / (classes - 1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def _far(own: Any, recorded: Any) -> float:
    own, recorded = (np.asarray(x, dtype=np.float64) for x in (own, recorded))
    assert own.shape == recorded.shape, (own.shape, recorded.shape)
    return float(np.abs(own - recorded).max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    found = differences(parser.parse_args(argv).folder)
    for what, (far, tolerance) in found.items():
        verdict = "" if far <= tolerance else "  TOO FAR"
        sys.stdout.write(f"{far:9.2g} of {tolerance:7.1g}  {what}{verdict}\n")
    return 0 if found and all(far <= tolerance for far, tolerance in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Predictions of detectors and segmentors for images without annotations.

`python -m object_detection.predict CONFIG CHECKPOINT IMAGES ...` and its sibling call `main`.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from checkpoints import fitting
from dense.classes import check_heads
from dense.configs import import_quietly
from dense.run import load_config, need_stack
from inference.labels import as_unicode
from input_pipeline.folders import find_images
from models import accelerate
from runtime.errors import UserError, one_line, print_any_name, reason_of
from runtime.files import written_whole

UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""Category ids up to 90 that COCO does not use."""


def main(task: str, argv: list[str] | None = None) -> int:
    """Predict; return the exit status: 0 if any image could be used.

    `task` is 'object_detection' or 'semantic_segmentation'; `argv` is sys.argv[1:] by default.
    """
    program = f"{task}.predict"
    print_any_name()
    try:
        need_stack()
        try:
            arguments = parser(task).parse_args(argv)
        except ValueError:
            raise UserError("--cfg-options: give settings as NAME=VALUE") from None
        return predict(task, arguments)
    except (UserError, OSError) as error:
        sys.stderr.write(f"{program}: error: {one_line(error)}\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
    return 1


def parser(task: str) -> argparse.ArgumentParser:
    from mmengine.config import DictAction

    this = argparse.ArgumentParser(f"python -m {task}.predict")
    add = this.add_argument
    add("config", help="a file in configs/")
    add("checkpoint", help="weights of the whole model: a path or URL")
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("--show-dir", help="folder for pictures of the predictions")
    if task == "object_detection":
        add("--out", help="file for boxes and masks: COCO results, .json")
        add("--score-thr", type=float, default=0.3, help="lowest score in pictures (0.3)")
    else:
        add("--out", help="folder for masks: PNG files with a palette")
    add("--cfg-options", "--options", nargs="+", action=DictAction, help="settings: a.b=value ...")
    this.set_defaults(launcher="none", work_dir=None)
    return this


def predict(task: str, arguments: argparse.Namespace) -> int:
    """Write the predictions that the arguments ask for, and print a line per image."""
    import_quietly()
    from dense.outputs import names_below, without_suffix

    is_detector = task == "object_detection"
    if arguments.out and is_detector and not arguments.out.endswith(".json"):
        raise UserError(f"--out {arguments.out}: give a name that ends in .json")
    found = find_images(arguments.images)
    files = list({os.path.abspath(file): str(file) for file in found}.values())
    folders = filter(os.path.isdir, map(os.path.expanduser, arguments.images))
    names = names_below(files, folders)
    stems = without_suffix(names)
    _check_targets(stems, arguments, is_detector)
    config = load_config(arguments, task)
    check_heads(config, ("test",))
    predictor = Predictor(config, arguments.checkpoint)
    write = (Detections if is_detector else Masks)(predictor.metainfo, arguments)
    write.pictures.color_type = predictor.color_type
    done = 0
    for number, file in enumerate(files, start=1):
        try:
            sample = predictor(file, number)
        except UserError as error:
            sys.stderr.write(f"skipped: {one_line(error)}\n")
            continue
        summary = write(file, names[file], stems[file], sample)
        sys.stdout.write(f"{file}  {summary}\n")
        done += 1
    write.close()
    return 0 if done else 1


def _check_targets(stems: dict[str, str], arguments: Any, is_detector: bool) -> None:
    """Raise UserError if a file to write is an image to read, or two are the same."""
    inputs = {os.path.realpath(file) for file in stems}
    flags = {"--show-dir": arguments.show_dir, "--out": None if is_detector else arguments.out}
    folders = {flag: os.path.realpath(folder) for flag, folder in flags.items() if folder}
    if len(set(folders.values())) < len(folders):
        raise UserError("--out and --show-dir are one folder: masks would overwrite pictures")
    for flag, folder in folders.items():
        for stem in stems.values():
            if (path := os.path.realpath(f"{folder}/{stem}.png")) in inputs:
                raise UserError(f"{flag} {flags[flag]}: would overwrite the image {path}")


class Predictor:
    """A detector or segmentor with the pipeline of its test data, without annotations.

    `dataset` is the config's test data, not loaded; `metainfo` its classes, palette and
    reduce_zero_label. Raises UserError if the checkpoint does not fit.
    """

    def __init__(self, config: Any, checkpoint: str) -> None:
        from mmengine.dataset import Compose
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import DATASETS, MODELS, init_default_scope

        from dense import loading

        init_default_scope(config.default_scope)
        self.is_detector = config.default_scope == "mmdet"
        dataset = config.test_dataloader.dataset
        while "pipeline" not in dataset:  # wrappers such as ConcatDataset and RepeatDataset
            dataset = dataset["dataset"] if "dataset" in dataset else dataset["datasets"][0]
        self.dataset = DATASETS.build({**dataset, "lazy_init": True})
        self.metainfo = self.dataset.metainfo
        self.pipeline = Compose(
            [step for step in dataset["pipeline"] if "Annotations" not in str(step["type"])]
        )
        flags = [getattr(step, "color_type", None) for step in self.pipeline.transforms]
        self.color_type = next(filter(None, flags), "color")
        self.model = revert_sync_batchnorm(MODELS.build(config.model))
        accelerate(self.model)
        state = loading.read(checkpoint)
        loading.check_names(state, self.metainfo["classes"], checkpoint)
        weights = loading.weights_of(self.model, state, checkpoint)
        fitting.load_exactly(self.model, weights, checkpoint)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.no_grad()
    def __call__(self, file: str, number: int) -> Any:
        """Return the data sample with the predictions; UserError if the image cannot be used."""
        try:
            loaded = self.pipeline({"img_path": file, "img_id": number})
        except Exception as error:  # of OpenCV, ...
            raise UserError(f"image {file} cannot be used: {reason_of(error)}") from None
        batch = {name: [value] for name, value in loaded.items()}
        return self.model.test_step(batch)[0]


class Detections:
    """Draws a detector's boxes and masks, and collects them for one file of COCO results."""

    def __init__(self, metainfo: dict[str, Any], arguments: argparse.Namespace) -> None:
        from mmdet.datasets import CocoDataset
        from mmdet.visualization import DetLocalVisualizer

        self.names: tuple[str, ...] = tuple(metainfo["classes"])
        self.ids = list(range(1, len(self.names) + 1))
        if self.names == tuple(CocoDataset.METAINFO["classes"]):
            self.ids = [number for number in range(1, 91) if number not in UNUSED_IDS]
        self.out = Path(arguments.out) if arguments.out else None
        if self.out:  # an error before the predictions
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self.threshold = arguments.score_thr
        self.results: list[dict[str, Any]] = []
        self.pictures = Pictures(DetLocalVisualizer, metainfo, arguments.show_dir)

    def __call__(self, file: str, name: str, stem: str, sample: Any) -> str:
        """Take the predictions of an image; return how many of each class are in the picture."""
        self.pictures.draw(file, stem, sample, pred_score_thr=self.threshold)
        found = sample.pred_instances.cpu()
        if self.out:
            self.results += self._coco_results(name, sample.img_id, found)
        labels = found.labels[found.scores > self.threshold].tolist()
        counts = Counter(self.names[label] for label in labels)
        return ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing"

    def _coco_results(self, name: str, number: int, found: Any) -> list[dict[str, Any]]:
        from mmdet.structures.mask import encode_mask_results

        rows = zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        results: list[dict[str, Any]] = [
            {
                "image_id": number,
                "file_name": as_unicode(name),
                "category_id": self.ids[label],
                "category": as_unicode(self.names[label]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label in rows
        ]
        if "masks" in found:
            for result, mask in zip(results, encode_mask_results(found.masks.numpy()), strict=True):
                result["segmentation"] = {**mask, "counts": mask["counts"].decode()}
        return results

    def close(self) -> None:
        """Write the file."""
        if self.out:
            with written_whole(self.out) as path:
                path.write_text(json.dumps(self.results), encoding="utf-8")


class Masks:
    """Draws a segmentor's masks, and writes each into a file."""

    def __init__(self, metainfo: dict[str, Any], arguments: argparse.Namespace) -> None:
        from mmseg.visualization import SegLocalVisualizer

        self.names, self.palette = metainfo["classes"], metainfo["palette"]
        self.skips_zero = bool(metainfo.get("reduce_zero_label"))
        self.out = Path(arguments.out) if arguments.out else None
        self.pictures = Pictures(SegLocalVisualizer, metainfo, arguments.show_dir)

    def __call__(self, file: str, name: str, stem: str, sample: Any) -> str:
        """Take the predictions of an image; return the shares of its five largest classes."""
        from dense.outputs import save_mask

        self.pictures.draw(file, stem, sample)
        labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
        if self.out:
            save_mask(labels, self.out / f"{stem}.png", self.skips_zero, self.palette)
        counts = Counter(labels.ravel().tolist()).most_common(5)
        return ", ".join(f"{n / labels.size:.1%} {self.names[label]}" for label, n in counts)

    def close(self) -> None:
        """Do nothing: all is written."""


class Pictures:
    """Draws predictions by a visualizer of mmdet or mmseg into `folder`, if that is given."""

    color_type = "color"
    """How images are read: turned as their EXIF metadata say, or not."""

    def __init__(self, visualizer: Any, metainfo: dict[str, Any], folder: str | None) -> None:
        from dense.outputs import number_names

        self.folder = Path(folder) if folder else None
        if self.folder:
            self.visualizer = visualizer()
            self.visualizer.dataset_meta = metainfo
            number_names(self.visualizer, self.folder)

    def draw(self, file: str, stem: str, sample: Any, **options: Any) -> None:
        import mmcv

        if self.folder:
            image = mmcv.imread(file, flag=self.color_type, channel_order="rgb")
            options["out_file"] = str(self.folder / f"{stem}.png")
            self.visualizer.add_datasample("", image, sample, draw_gt=False, **options)

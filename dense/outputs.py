"""Files that test and predict write: their names, masks, pictures, and the class names in these."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.engine.hooks import DetVisualizationHook
from mmengine.evaluator import BaseMetric
from mmengine.registry import HOOKS
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from inference.labels import as_unicode, drawable, printable

Names = dict[str, str]
"""A relative path for each file."""


def names_below(files: Iterable[str], folders: Iterable[str] = ()) -> Names:
    """Return the path of each file below the folder that contains all of them and `folders`."""
    paths = {file: os.path.abspath(file) for file in files}
    inside = {*map(os.path.abspath, folders), *map(os.path.dirname, paths.values())}
    root = os.path.commonpath(inside) if inside else ""
    return {file: os.path.relpath(path, root) for file, path in paths.items()}


def without_suffix(names: Names) -> Names:
    """Return the names without their suffix; those that differ only in the suffix keep it."""
    whole = set(names.values())
    stems = Counter(os.path.splitext(name)[0] for name in whole)

    def shortened(name: str) -> str:
        stem = os.path.splitext(name)[0]
        return stem if stems[stem] == 1 and stem not in whole else name

    return {file: shortened(name) for file, name in names.items()}


def names_of(dataset: Any) -> Names:
    """Return the path of each image of a data set of mmdet or mmseg below its data folder."""
    files = [dataset.get_data_info(index)["img_path"] for index in range(len(dataset))]
    return names_below(files, folders_of(dataset))


def folders_of(dataset: Any) -> list[str]:
    """Return the folders of images of a data set of mmdet or mmseg."""
    # wrappers such as ConcatDataset and RepeatDataset
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    if inner != [None]:
        return [folder for part in inner for folder in folders_of(part)]
    prefix = dataset.data_prefix
    return [folder for folder in (prefix.get("img_path"), prefix.get("img")) if folder]


def save_mask(
    labels: np.ndarray, path: Path, skips_zero: bool = False, palette: Any = None
) -> None:
    """Save the labels of an image (H, W) as PNG: 8 bits per pixel, with a palette if given.

    Labels above 255 take 16 bits, and have no palette. `skips_zero` is mmseg's reduce_zero_label:
    values in files are larger by one, 0 is no class.
    """
    values = labels + int(skips_zero)
    is_small = values.max(initial=0) < 256
    mask = Image.fromarray(values.astype(np.uint8 if is_small else np.uint16))
    if palette is not None and is_small:
        colors = [[0, 0, 0]] * skips_zero + list(palette)
        mask.putpalette([int(value) for color in colors for value in color])
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


class SaveMasks(BaseMetric):
    """Saves a segmentor's masks as folder/PATH.png, by the images' paths below the data folder."""

    default_prefix = "masks"

    def __init__(self, folder: str, dataset: Any) -> None:
        super().__init__()
        self.folder, self.names = Path(folder), without_suffix(names_of(dataset))

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        for sample in data_samples:
            labels = sample["pred_sem_seg"]["data"].squeeze().cpu().numpy()
            path = self.folder / f"{self.names[sample['img_path']]}.png"
            save_mask(labels, path, bool(sample.get("reduce_zero_label")))
            self.results.append(None)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {}


@HOOKS.register_module()
class PicturesByPath(DetVisualizationHook):
    """mmdet's hook, with pictures at the images' paths below the data folder."""

    test_out_dir: str

    def before_test(self, runner: Any) -> None:
        self.names = names_of(runner.test_loop.dataloader.dataset)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any, outputs: Sequence[Any]
    ) -> None:
        folder = self.test_out_dir
        for sample in outputs:
            self.test_out_dir = os.path.join(folder, os.path.dirname(self.names[sample.img_path]))
            super().after_test_iter(runner, batch_idx, data_batch, [sample])
        self.test_out_dir = folder


def number_names(visualizer: Any, folder: Path) -> None:
    """Let a visualizer draw '#3' for class names that its font lacks.

    folder/classes.txt, a legend, is written if there are any.
    """
    names = list(visualizer.dataset_meta["classes"])
    if isinstance(visualizer, SegLocalVisualizer):  # OpenCV's font
        drawn = [n if n.isascii() else f"#{i}" for i, n in enumerate(map(printable, names))]
    else:  # matplotlib's, where $ begins a formula
        drawn = [name.replace("$", r"\$") for name in drawable(names)]
    visualizer.dataset_meta = {**visualizer.dataset_meta, "classes": drawn}
    pairs = ((f"#{i}", as_unicode(name)) for i, name in enumerate(names))
    legend = [f"{number}\t{name}\n" for number, name in pairs if number in drawn]
    if legend:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "classes.txt").write_text("".join(legend), encoding="utf-8")

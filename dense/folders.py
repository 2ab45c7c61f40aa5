"""Images and masks of one's own, in two folders, for mmseg."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from input_pipeline.folders import find_images, suffix_of
from runtime.errors import UserError, some


@DATASETS.register_module()
class FolderSegDataset(BaseSegDataset):
    """Images of any suffix, in folders within `img_path`, with masks of the same name.

    The mask of a/b.JPG is a/b.png in `seg_map_path` (`seg_map_suffix`, in any case). Images without
    a mask are left out and told; UserError if none is left, two images have the same mask, or there
    is an `ann_file`, a list of images.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        if self.ann_file:
            raise UserError(
                f"FolderSegDataset takes whole folders: leave out ann_file {self.ann_file}"
            )
        if not {"img_path", "seg_map_path"} <= self.data_prefix.keys():
            raise UserError(
                "FolderSegDataset: give data_prefix=dict(img_path=..., seg_map_path=...)"
            )
        images = Path(self.data_prefix["img_path"])
        masks = Path(self.data_prefix["seg_map_path"])
        for folder in (images, masks):
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder")
        suffix = self.seg_map_suffix.lower()
        known: dict[Path, Path] = {}
        for path in find_images([str(masks)]):
            if path.name.lower().endswith(suffix):
                name = path.relative_to(masks).with_name(path.name[: -len(suffix)])
                if name in known:
                    raise UserError(f"{path} and {known[name]} are of the same image: remove one")
                known[name] = path
        found: dict[Path, Path] = {}
        without: list[str] = []
        for path in find_images([str(images)]):
            name = path.relative_to(images).with_suffix("")
            if name in found:
                raise UserError(f"{path} and {found[name]} have the same mask: rename one of them")
            if name in known:
                found[name] = path
            else:
                without.append(path.name)
        if not found:
            raise UserError(f"no image of {images} has a mask of its name in {masks}")
        suffixes = Counter(path.suffix for path in found.values())
        if len(suffixes) > 1:
            counts = ", ".join(f"{count} {kind}" for kind, count in suffixes.items())
            print_log(f"{images}: images of several suffixes: {counts}", "current", logging.WARNING)
        if without:
            print_log(
                f"{images}: {len(without)} images without a mask are left out: {some(without, 3)}",
                "current", logging.WARNING,
            )  # fmt: skip
        common = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [
            {"img_path": str(path), "seg_map_path": str(known[name]), "seg_fields": [], **common}
            for name, path in found.items()
        ]


def tell_other_suffixes(dataset: BaseSegDataset) -> None:
    """Warn of images that a data set of mmseg leaves out, because they have another suffix."""
    folder = Path(dataset.data_prefix.get("img_path") or "")
    if isinstance(dataset, FolderSegDataset) or dataset.ann_file or not folder.is_dir():
        return
    try:
        images = find_images([str(folder)])
    except UserError:  # files of another kind, as for other loaders
        return
    others = [path for path in images if not path.name.endswith(dataset.img_suffix)]
    if others:
        kinds = Counter(suffix_of(path.name) for path in others)
        print_log(
            f"{folder}: {len(others)} images are left out, whose suffix is not "
            f"{dataset.img_suffix}: {some(kinds)}", "current", logging.WARNING,
        )  # fmt: skip

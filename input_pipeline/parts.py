"""Which folders of a data set hold its training and its evaluation images, by their names."""

import re
from pathlib import Path

from runtime.errors import UserError, some

NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
"""Words of folder names, in lower case."""
FILLERS = ("set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder", "files")
"""Words that such a name may have in addition, as in training_set."""


def find_parts(root: Path, guesses: bool = True) -> dict[str, Path]:
    """Return the folders of the parts 'train', 'val' and 'test' that a folder holds.

    Raises UserError if two folders have other names of the same part, or, with `guesses`, if names
    look like parts, so that nobody trains a classifier of seg_train and seg_test.
    """
    try:
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    except OSError as error:
        raise UserError(f"folder {root} cannot be read: {error.strerror}") from None
    parts: dict[str, Path] = {}
    for part in NAMES:
        found = [folder for folder in folders if part_of(folder.name) == part]
        exact = [folder for folder in found if folder.name == part]
        if len(found) > 1 and not exact:
            raise UserError(
                f"{root} holds both {found[0].name}/ and {found[1].name}/: call one of them {part}/"
            )
        if found:
            parts[part] = (exact or found)[0]
    if not parts and guesses:
        train, others = (
            [folder.name for folder in folders if _words(folder.name) & words]
            for words in ({*NAMES["train"]}, {*NAMES["val"], *NAMES["test"]})
        )
        if train and others:
            raise UserError(
                f"{root} holds {some(train)} and {some(others)}, "
                "which look like parts of a data set: call them train/ and val/, or give one as "
                "--data_path and the other as --eval_data_path"
            )
    return parts


def part_of(name: str) -> str:
    """Return the part that a folder's name says it is: 'train', 'val', 'test' or ''."""
    words = _words(name) - {*FILLERS}
    for part, names in NAMES.items():
        joined = {name + filler for name in names for filler in FILLERS}  # trainset
        if len(words) == 1 and words <= {*names} | joined:
            return part
    return ""


def _words(name: str) -> set[str]:
    # TrainImages, train-images, Train_Images
    return set(re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()))

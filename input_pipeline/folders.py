"""The scan of folders: which files are images, and in which class each is.

Hidden files, thumbnails and the like are left out, and so are folders of runs. Links are followed,
but each folder is scanned once, so loops end, and a link to a folder brings no images of one
class into another: links come after all real folders.
"""

import os
import unicodedata
from collections import Counter, deque
from pathlib import Path

from input_pipeline.images import image_suffixes
from input_pipeline.listing import Listing
from runtime.errors import UserError
from runtime.files import FORGOTTEN, RUN_LOCK, holds_run

SYSTEM_NAMES = frozenset(
    {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "system volume information"}
    | {"$recycle.bin", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "@tmp"}
)
"""What NAS devices, macOS and Windows put beside images, in lower case."""


def list_classes(
    folder: Path, leave_out: Path | None = None, suffixes: frozenset[str] | None = None
) -> Listing:
    """List the images of a folder with one folder per class; UserError if there is none.

    Classes are sorted by name, in Unicode's NFC, and images by folder and name, as torchvision's
    ImageFolder does. `leave_out` is a folder that is not scanned; `suffixes` are those of other
    files than images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    scan = _Scan(folder, leave_out, suffixes)
    names = {name: unicodedata.normalize("NFC", name) for name in scan.folders()}
    found = scan.images(list(names))
    # a folder that only holds runs is not a class
    only_runs = {names[start] for start in scan.with_runs} - {names[start] for start, _, _ in found}
    classes = sorted(set(names.values()) - only_runs)
    if not classes:
        raise UserError(f"{folder} needs one folder of images per class: it has no folders")
    labels = {name: label for label, name in enumerate(classes)}
    ordered = sorted((labels[names[start]], inside, files) for start, inside, files in found)
    images = ((label, f"{inside}/{f}") for label, inside, files in ordered for f in sorted(files))
    return Listing.of(folder, classes, images, dict(scan.skipped))


def find_images(arguments: list[str]) -> list[Path]:
    """Return the files, and all images inside folders, sorted.

    Raises UserError if a path does not exist, or a folder has no images.
    """
    files: list[Path] = []
    for path in (Path(argument).expanduser() for argument in arguments):
        if not os.path.lexists(path):
            raise UserError(f"{path} does not exist: give images, or folders of them")
        inside = [path]
        if path.is_dir():
            found = _Scan(path).images([""])
            inside = sorted(path / folder / name for _, folder, names in found for name in names)
        if not inside:
            raise UserError(f"folder {path} has no images")
        files += inside
    return files


def images_by_folder(root: Path) -> tuple[list[tuple[str, list[str]]], dict[str, int]]:
    """Return the folders that hold images, at any depth, with the files in each, sorted by folder.

    Folders are relative to `root`; the second are the numbers of other files by suffix.
    """
    scan = _Scan(root)
    found = sorted((folder, files) for _, folder, files in scan.images([""]))
    return found, dict(scan.skipped)


class _Scan:
    """A walk through the folders below `root`; `skipped` counts other files by suffix."""

    def __init__(
        self,
        root: Path,
        leave_out: Path | None = None,
        suffixes: frozenset[str] | None = None,
    ) -> None:
        self.root, self.skipped, self.with_runs = str(root), Counter[str](), set[str]()
        self.suffixes = suffixes or image_suffixes()
        top = Path(os.path.realpath(root))
        # a link to a folder above the root would bring in images from outside
        outside = [*top.parents, *([leave_out] if leave_out else [])]
        self.seen = {os.path.realpath(path) for path in outside}

    def folders(self) -> list[str]:
        """Return the folders directly in the root, real ones before links."""
        self.seen.add(os.path.realpath(self.root))
        found = []
        for entry in self._entries(self.root, ""):
            if not entry.is_dir():
                self.skipped[f"{suffix_of(entry.name)} in no class folder"] += 1
            elif os.path.realpath(entry.path) not in self.seen:
                found.append((entry.is_symlink(), entry.name))
        return [name for _, name in sorted(found)]

    def images(self, starts: list[str]) -> list[tuple[str, str, list[str]]]:
        """Return the images below these folders: (start, folder relative to the root, files)."""
        found = []
        queue = deque((start, start) for start in starts)
        while queue:
            start, inside = queue.popleft()
            folder = os.path.join(self.root, inside)
            # not by inode, which some network file systems do not have
            real = os.path.realpath(folder)
            if real in self.seen:
                continue
            self.seen.add(real)
            files = []
            for entry in self._entries(folder, start):
                if entry.is_dir():
                    path = os.path.join(inside, entry.name)
                    # links come after all real folders and starts
                    (queue.append if entry.is_symlink() else queue.appendleft)((start, path))
                elif (suffix := suffix_of(entry.name)) in self.suffixes:
                    files.append(entry.name)
                else:
                    self.skipped[suffix] += 1
            if files:
                found.append((start, inside, files))
        return found

    def _entries(self, folder: str, start: str) -> list[os.DirEntry[str]]:
        """Return what is visible in a folder; nothing if it is that of a run, below the root."""
        try:
            with os.scandir(folder) as entries:
                every = list(entries)
        except OSError as error:
            raise UserError(f"folder {folder} cannot be read: {error.strerror}") from None
        is_run = any(entry.name == RUN_LOCK for entry in every) and holds_run(Path(folder))
        if is_run:  # and data, too
            every = [entry for entry in every if entry.name != FORGOTTEN]
        if is_run and not os.path.samefile(folder, self.root):
            self.with_runs.add(start)
            return []
        return [entry for entry in every if not is_hidden(entry.name) and _ends(entry)]


def _ends(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry leads somewhere: a link to itself does not."""
    try:
        entry.is_dir()
    except OSError:
        return False
    return True


def folders_in(root: Path) -> list[Path]:
    """Return the visible folders in a folder, without those of runs, sorted."""
    folders = (path for path in root.iterdir() if not is_hidden(path.name) and path.is_dir())
    return sorted(path for path in folders if not holds_run(path) and path.name != FORGOTTEN)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"

"""Images in tar files, which stay packed: their places are listed from the headers.

The folder of an image is its class; without a folder, the name of its tar file. Numbers in names
sort as numbers, as in timm's reader of tar files.
"""

import io
import logging
import os
import posixpath
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.utils.misc import natural_key

from input_pipeline.folders import is_hidden, suffix_of
from input_pipeline.image_sets import ListedImages
from input_pipeline.images import Decoding, decoded, image_suffixes, readable
from input_pipeline.listing import Listing
from runtime.errors import UserError

logger = logging.getLogger(__name__)


class TarImages(ListedImages):
    """Images in tar files."""

    def __init__(self, listing: Listing, transform: Any, decoding: Decoding) -> None:
        super().__init__(listing, transform, decoding)
        self._opened: dict[str, BinaryIO] = {}

    def read(self, index: int) -> tuple[Any, int]:
        tar, offset, size = self.source.places[index].tolist()
        path = self.source.tars[tar]
        with readable(f"{self.name(index)} in {path}"):
            if path not in self._opened:
                self._opened[path] = open(path, "rb")  # noqa: SIM115 - stays open
            # forked workers share the position in the file, which pread does not use
            content = os.pread(self._opened[path].fileno(), size, offset)
            if len(content) < size:
                raise OSError("the tar file ends inside the image")
            image = decoded(io.BytesIO(content), self.decoding)
        return image, self.numbered(int(self.source.labels[index]))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": {}}  # other workers open the files themselves


def list_tars(path: Path) -> Listing:
    """List the images in a tar file, in a folder of tar files, and in tar files inside these."""
    if path.is_dir():
        files = sorted(path.glob("*.tar"), key=lambda file: natural_key(file.name))
        folders = [file.stem for file in files]
    else:
        files, folders = [path], [""]
    if not files or not path.exists():
        raise UserError(f"{path} is neither a tar file nor a folder of tar files")
    skipped = Counter[str]()
    found: list[tuple[str, str, int, int, int]] = []
    for number, (file, folder) in enumerate(zip(files, folders, strict=True)):
        try:
            with tarfile.open(file, "r:") as tar:
                # of members with the same path, unpacking would leave the last
                images = {name: rest for name, *rest in _images(tar, folder, 0, skipped)}
                found += [(label, name, number, *place) for name, (label, *place) in images.items()]
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"tar file {file} cannot be read: {error}") from None
    depths = {inside.count("/") for _, inside, *_ in found}
    if len(depths) > 1:
        logger.warning("%s has folders of several depths: the innermost is the class", path)
    found.sort(key=lambda image: _order(image[1]))
    classes = sorted({image[0] for image in found}, key=_order)
    labels = {name: label for label, name in enumerate(classes)}
    return Listing.of(
        path, classes, ((labels[name], inside) for name, inside, *_ in found), dict(skipped),
        tars=[str(file) for file in files],
        places=torch.tensor([place for _, _, *place in found], dtype=torch.int64),
    )  # fmt: skip


def _order(name: str) -> tuple[Any, str]:
    return natural_key(name), name  # of '01' and '1', and of 'A' and 'a', the first is the same


def _images(
    tar: tarfile.TarFile, folder: str, start: int, skipped: Counter[str]
) -> Iterator[tuple[Any, ...]]:
    """Yield path, class, offset and size of each image of a tar file that begins at `start`."""
    suffixes = image_suffixes()
    places: dict[str, tuple[int, int]] = {}  # for links
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined] # they take a kilobyte each
        inside = posixpath.normpath(member.name)
        path = posixpath.normpath(posixpath.join(folder, inside))
        suffix = suffix_of(path)
        if member.isdir() or any(map(is_hidden, path.split("/"))):
            continue
        target = inside
        if member.islnk():
            target = posixpath.normpath(member.linkname)
        elif member.issym():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(inside), member.linkname))
        elif member.isreg():
            places[inside] = start + member.offset_data, member.size
        if target not in places:
            skipped["links to what is not before them"] += 1
        elif suffix == ".tar" and member.isreg():
            nested_folder = posixpath.splitext(path)[0]
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as nested:
                yield from _images(nested, nested_folder, start + member.offset_data, skipped)
        elif suffix not in suffixes or "/" not in path:
            skipped[suffix if suffix not in suffixes else f"{suffix} in no class folder"] += 1
        else:
            name = unicodedata.normalize("NFC", posixpath.basename(posixpath.dirname(path)))
            yield path, name, *places[target]
    # tarfile takes a damaged header for the end
    tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # type: ignore[union-attr]
        raise tarfile.ReadError(f"the header at byte {start + tar.offset} is damaged")

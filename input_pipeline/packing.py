"""Packed copies of class folders: smaller images, in files that are read faster.

An image job is a range of the listing. It leaves a small file in OUT/.pack when it is done, so a
pack that was killed goes on with the other jobs.
"""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from input_pipeline.folders import list_classes, suffix_of
from input_pipeline.image_sets import ListedImages
from input_pipeline.images import AS_RELEASED, load_image, orientation_of, readable
from input_pipeline.listing import Listing, held_out
from input_pipeline.parts import find_parts
from input_pipeline.tar_files import TarImages, list_tars
from runtime.errors import UserError
from runtime.files import written_whole
from runtime.signals import SIGNALS, signals_blocked

FACTS = "pack.json"
UNREADABLE_FILE = "unreadable.txt"
DONE = ".pack"
"""Folder in that of a pack for what its finished jobs tell."""
CLASSES = "classes.txt"
"""File in a pack for WebDataset: a class name per line."""
PER_JOB = 2000  # images
SAMPLE = 16  # images of a part, about, whose pixels are compared at the end


@dataclass(frozen=True)
class Packing:
    """How images are packed."""

    format: str = "tar"
    """folders, tar or wds."""
    short_side: int = 288
    """Pixels; smaller images are copied."""
    quality: int = 92
    """Of JPEG."""
    all_parts: bool = False
    """Make evaluation images smaller, too; otherwise they are copied."""
    val_fraction: float = 0
    """Fraction of the training images to hold out for evaluation, the same as main.py does."""


@dataclass(frozen=True)
class Job:
    """Images start to end - 1 of a listing, packed into `target`: a tar file, or a folder."""

    listing: Listing
    start: int
    end: int
    target: Path
    done: Path
    packing: Packing
    shrinks: bool


@dataclass(frozen=True)
class Summary:
    """What became of the images: `difference` is the largest mean one of a sample, of 255 steps."""

    images: int
    unreadable: int
    difference: float
    classes: int
    shards: dict[str, tuple[int, int]]
    """Part -> number of jobs, and images."""


def pack(
    source: Path,
    output: Path,
    packing: Packing,
    workers: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Pack the class folders of `source`, and of its parts train, val and test.

    `tell` gets the images done and all of them, after each job. A pack that was begun with the
    same options goes on. Raises UserError if another one, or anything else, is in `output`, if it
    cannot be written, or if what was written is not what was to be.
    """
    parts = find_parts(source, guesses=False) or {"": source}
    listings = _numbered_alike({part: list_classes(folder) for part, folder in parts.items()})
    if packing.val_fraction:
        listings = _split(source, listings, packing.val_fraction)
    if packing.format == "wds" and (bad := [c for c in _classes(listings) if "\n" in c]):
        raise UserError(
            f"class {bad[0]!r} has a line break, which {CLASSES} cannot hold: rename it"
        )
    total = sum(map(len, listings.values()))
    facts = {"source": str(source.resolve()), "images": total, **asdict(packing)}
    _begin(output, facts)
    jobs = {part: [*_jobs(part, listing, output, packing)] for part, listing in listings.items()}
    todo = [job for own in jobs.values() for job in own if not job.done.is_file()]
    done = total - sum(job.end - job.start for job in todo)
    tell(done, total)
    processes = multiprocessing.get_context("spawn")
    stopped = processes.RawValue("b", False)  # without a lock, which a killed worker would hold
    try:
        with (
            ProcessPoolExecutor(
                min(workers, len(todo) or 1), processes, initializer=_ready,
                initargs=(todo, stopped),
            ) as pool,
            _stopping(pool, stopped),
        ):  # fmt: skip
            with signals_blocked():  # in the workers, which start here
                running = [pool.submit(_run, number) for number in range(len(todo))]
            for ended in as_completed(running):
                done += ended.result()
                tell(done, total)
    except BrokenProcessPool:
        raise UserError(
            "a worker ended, perhaps for lack of memory: give the same command with fewer "
            "--num_workers, and it goes on"
        ) from None
    finally:  # what ended processes have left
        for folder in (*output.glob(".*.tmp"), *output.glob("*/.*.tmp")):
            shutil.rmtree(folder, ignore_errors=True)
    return _finish(output, jobs)


def _split(source: Path, listings: dict[str, Listing], fraction: float) -> dict[str, Listing]:
    """Split the training images into train and val."""
    train = "train" if "train" in listings else ""
    if "val" in listings or train not in listings:
        raise UserError(
            f"--val_fraction {fraction:g}: {source} has {', '.join(listings)} already, and not the "
            "training images alone"
        )
    rest = {part: listing for part, listing in listings.items() if part != train}
    chosen = held_out(listings[train], fraction)
    return {part: listings[train].chosen(indices) for part, indices in chosen.items()} | rest


def _classes(listings: dict[str, Listing]) -> list[str]:
    return sorted({name for listing in listings.values() for name in listing.classes})


def _numbered_alike(listings: dict[str, Listing]) -> dict[str, Listing]:
    """Number the labels of all parts by the classes of all: one part may lack some."""
    classes = _classes(listings)
    numbers = {name: number for number, name in enumerate(classes)}
    numbered = {}
    for part, listing in listings.items():
        own = torch.tensor([numbers[name] for name in listing.classes], dtype=torch.int32)
        numbered[part] = replace(listing, classes=classes, labels=own[listing.labels])
    return numbered


@contextmanager
def _stopping(pool: ProcessPoolExecutor, stopped: Any) -> Iterator[None]:
    """Let the workers stop at once if there is an error, which otherwise waits for all jobs."""
    try:
        yield
    except BaseException:
        stopped.value = True
        pool.shutdown(cancel_futures=True)
        raise


@dataclass
class _Worker:
    """The jobs of a worker process."""

    jobs: list[Job]
    stopped: Any  # a boolean that is shared with the other processes


_worker: _Worker


def _ready(jobs: list[Job], stopped: Any) -> None:
    """Prepare a worker: it leaves Ctrl-C to the process that has started it, and ends with it."""
    global _worker
    _worker = _Worker(jobs, stopped)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _begin(output: Path, facts: dict[str, Any]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in output.iterdir()]
        if names and FACTS not in names:
            raise UserError(f"{output} is not empty: give a new folder")
        if names:
            before = json.loads((output / FACTS).read_text())
            changed = [name for name, value in facts.items() if before.get(name) != value]
            if changed:
                told = ", ".join(f"{n} {before.get(n)} (now {facts[n]})" for n in changed)
                raise UserError(f"{output} holds a pack of other {told}: give a new folder")
        (output / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        (output / DONE).mkdir(exist_ok=True)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{output} cannot be written, or its {FACTS} read: {error}") from None


def _jobs(part: str, listing: Listing, output: Path, packing: Packing) -> Iterator[Job]:
    folder = output / (part or ("" if packing.format == "folders" else "train"))
    shrinks = packing.all_parts or part in ("", "train")
    for number, start in enumerate(range(0, len(listing), PER_JOB)):
        end, name = min(start + PER_JOB, len(listing)), f"{number:06d}"
        if packing.format == "folders":
            target = folder
        elif packing.format == "tar":
            target = folder / f"{name}.tar"
        else:
            target = output / f"{part or 'train'}-{name}.tar"
        done = output / DONE / f"{part or 'all'}-{name}.json"
        yield Job(listing, start, end, target, done, packing, shrinks)


def _end_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _run(number: int) -> int:
    """Pack the images of a job of this worker; return how many there were."""
    unreadable: dict[str, str] = {}
    job = _worker.jobs[number]
    write = _write_folder if job.packing.format == "folders" else _write_tar
    try:
        counts = write(job, _images(job, unreadable))
        with written_whole(job.done) as written:
            written.write_text(json.dumps({"unreadable": unreadable, "counts": counts}))
    except OSError as error:
        raise UserError(f"{job.target} cannot be written: {error.strerror or error}") from None
    return job.end - job.start


def _images(job: Job, unreadable: dict[str, str]) -> Iterator[tuple[int, int, bytes, str]]:
    """Yield index, label, content and suffix of each image that can be read."""
    for index in range(job.start, job.end):
        if _worker.stopped.value:
            raise InterruptedError
        path = job.listing[index]
        try:
            content, suffix = packed(path, job.packing, job.shrinks)
        except UserError as error:
            unreadable[os.fsencode(path).decode(errors="backslashreplace")] = str(error)
            continue
        yield index, int(job.listing.labels[index]), content, suffix


def packed(path: str, packing: Packing, shrinks: bool = True) -> tuple[bytes, str]:
    """Return a smaller JPEG of an image file, or its own content, and the suffix.

    Small images are copied, and those that a JPEG cannot hold: with transparency, or of more than 8
    bits. A JPEG keeps the EXIF orientation, and no other metadata. UserError if it is unreadable.
    """
    with readable(path):
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            small = not shrinks or min(image.size) <= packing.short_side
            deep = image.mode == "F" or image.mode.startswith("I")
            if not small and not deep and not image.has_transparency_data:
                return _smaller(image, packing), ".jpg"
            suffix = suffix_of(path)
            if packing.format == "wds" and suffix not in (".jpg", ".jpeg", ".png"):
                lossless = io.BytesIO()
                image.save(lossless, "PNG", exif=_exif(image))
                return lossless.getvalue(), ".png"
            return content, suffix


def _smaller(image: Image.Image, packing: Packing) -> bytes:
    colours = image.convert("L" if image.mode in ("1", "L") else "RGB")
    factor = packing.short_side / min(colours.size)
    size = [max(1, round(factor * side)) for side in colours.size]
    data = io.BytesIO()
    colours.resize(size, Image.Resampling.BICUBIC).save(
        data, "JPEG", quality=packing.quality, exif=_exif(image)
    )
    return data.getvalue()


def _exif(image: Image.Image) -> Image.Exif:
    exif, orientation = Image.Exif(), orientation_of(image)
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation
    return exif


def _inside(job: Job, index: int, suffix: str) -> str:
    """Return the path of a packed image in its folder or tar file.

    It is that of the source, except that `.png` becomes `.png.jpg`, and that tar files, in which
    the innermost folder is the class, have no folders below it.
    """
    path = os.fsdecode(job.listing.path(index))
    if suffix_of(path) != suffix and {suffix_of(path), suffix} != {".jpg", ".jpeg"}:
        path += suffix
    if job.packing.format == "folders":
        return path
    label = int(job.listing.labels[index])
    return f"{job.listing.classes[label]}/{'__'.join(path.split('/')[1:])}"


def _write_folder(job: Job, images: Iterator[tuple[int, int, bytes, str]]) -> Counter[str]:
    counts = Counter[str]()
    for index, label, content, suffix in images:
        file = job.target / _inside(job, index, suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        counts[str(label)] += 1
    return counts


def _write_tar(job: Job, images: Iterator[tuple[int, int, bytes, str]]) -> Counter[str]:
    counts = Counter[str]()
    job.target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(job.target) as written, tarfile.open(written, "w") as tar:
        for index, label, content, suffix in images:
            if job.packing.format == "wds":
                suffix = ".jpg" if suffix == ".jpeg" else suffix
                _add(tar, f"{index:09d}{suffix}", content)
                _add(tar, f"{index:09d}.cls", str(label).encode())
            else:
                _add(tar, _inside(job, index, suffix), content)
            counts[str(label)] += 1
    return counts


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _finish(output: Path, jobs: dict[str, list[Job]]) -> Summary:
    """Compare the pack with its source, and write unreadable.txt and, for wds, classes.txt."""
    unreadable: dict[str, str] = {}
    worst, shards = 0.0, {}
    for part, own in jobs.items():
        listing = own[0].listing
        told = [json.loads(job.done.read_text()) for job in own]
        for one in told:
            unreadable |= one["unreadable"]
        wanted = torch.zeros(len(listing.classes), dtype=torch.int64)
        for label, count in (item for one in told for item in one["counts"].items()):
            wanted[int(label)] += count
        if own[0].packing.format == "wds":
            found = sum((_counts_of_wds(job.target, len(wanted)) for job in own), 0 * wanted)
            names = "".join(f"{name}\n" for name in listing.classes)
            (output / CLASSES).write_bytes(os.fsencode(names))
        else:
            is_tar = own[0].packing.format == "tar"
            packed_set = (list_tars if is_tar else list_classes)(_folder(own[0]))
            numbers = [listing.classes.index(name) for name in packed_set.classes]
            found = 0 * wanted
            found[numbers] = packed_set.counts()
            worst = max(worst, _difference(own, packed_set))
        shards[part or "train"] = len(own), int(wanted.sum())
        if not torch.equal(found, wanted):
            raise UserError(
                f"{output}: {part or 'the pack'} has {int(found.sum())} images, not the "
                f"{int(wanted.sum())} that were packed, by class: remove it, and pack again"
            )
    text = "".join(f"{path}\t{why}\n" for path, why in sorted(unreadable.items()))
    if text:
        (output / UNREADABLE_FILE).write_text(text)
    images, classes = sum(n for _, n in shards.values()), len(wanted)
    return Summary(images, len(unreadable), worst, classes, shards)


def _folder(job: Job) -> Path:
    return job.target if job.packing.format == "folders" else job.target.parent


def _counts_of_wds(path: Path, classes: int) -> Tensor:
    with tarfile.open(path) as tar:
        labels = [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]  # type: ignore
    return torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=classes)


def _difference(jobs: list[Job], packed_set: Listing) -> float:
    """Return the largest mean difference to the source, of 255 steps, of the first images of jobs.

    Those of SAMPLE jobs, spread evenly; images that could not be read are left out.
    """
    sources: dict[bytes, str] = {}  # path in the pack -> file
    for job in jobs[:: max(1, len(jobs) // SAMPLE)]:
        file = job.listing[job.start]
        shard = f"{job.target.stem}/" if packed_set.tars else ""
        for suffix in (".jpg", suffix_of(file)):
            sources[os.fsencode(shard + _inside(job, job.start, suffix))] = file
    kind = TarImages if packed_set.tars else ListedImages
    images, worst = kind(packed_set, None, AS_RELEASED), 0.0
    for index, path in enumerate(packed_set.paths()):
        if path in sources:
            image = images.read(index)[0]
            source = load_image(sources[path], AS_RELEASED)
            source = source.resize(image.size, Image.Resampling.BICUBIC)
            pair = (np.asarray(x, dtype=np.float32) for x in (image, source))
            worst = max(worst, float(np.abs(np.subtract(*pair)).mean()))
    return worst

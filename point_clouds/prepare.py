"""Reads the clouds of a data set once, and writes train.npz and test.npz, which are fast to read.

python -m point_clouds.prepare ModelNet40 data/modelnet40_normal_resampled data/ModelNet40
"""

import os
import sys
from argparse import Namespace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from point_clouds.datasets import READERS, stored_part
from point_clouds.readers import check_cloud, read_cloud
from point_clouds.sampling import farthest_points, to_unit_sphere
from runtime.errors import Parser, UserError, check_positive, program
from runtime.files import written_whole
from utils import cpu_cores


def parser() -> Parser:
    this = Parser(prog="python -m point_clouds.prepare", description=__doc__)
    this.add_argument("data_set", choices=READERS)
    this.add_argument("data_path", type=Path, help="folder of the data set")
    this.add_argument("output", type=Path, help="folder for train.npz and test.npz")
    this.add_argument("--num-points", type=int, default=8192, help="points per cloud (8192)")
    this.add_argument("--jobs", type=int, default=cpu_cores(), help="processes (all cores)")
    return this


@program(parser)
def main(arguments: Namespace) -> None:
    check_positive(arguments, "num_points", "jobs")
    root, output = arguments.data_path, arguments.output
    parts = {part: stored_part(arguments.data_set, root, part) for part in ("train", "test")}
    for part in parts:
        if (output / f"{part}.npz").exists():
            raise UserError(f"{output / part}.npz exists: remove it, or give another folder")
    output.mkdir(parents=True, exist_ok=True)
    for part, (listing, stored) in parts.items():
        count = len(listing)
        sources = (stored[i] if stored else listing[i] for i in range(count))
        choose = partial(chosen_points, count=arguments.num_points)
        with Pool(arguments.jobs) as pool:
            clouds = pool.imap(choose, sources, chunksize=8)
            found = list(tqdm(clouds, part, count, leave=False, disable=None))
        kept = [number for number, cloud in enumerate(found) if not isinstance(cloud, str)]
        for number in sorted({*range(count)} - {*kept}):
            sys.stderr.write(f"left out: {os.fsdecode(listing.path(number))}: {found[number]}\n")
        if not kept:
            raise UserError(f"{root} has no {part} cloud that can be read")
        with written_whole(output / f"{part}.npz") as path, path.open("wb") as file:
            np.savez(
                file,
                points=np.concatenate([found[number] for number in kept]),
                ends=np.cumsum([len(found[number]) for number in kept]),
                labels=listing.labels.numpy()[kept],
                classes=np.array(listing.classes),
                names=np.array([os.fsdecode(listing.path(number)) for number in kept]),
            )
        sys.stdout.write(f"{output / part}.npz: {len(kept)} clouds\n")


def chosen_points(source: str | np.ndarray, count: int) -> np.ndarray | str:
    """Return the farthest points of a cloud or a file, `count` at most, or what is wrong with it.

    They are chosen as if the cloud were in the unit sphere, and keep their coordinates.
    """
    try:
        cloud = read_cloud(source) if isinstance(source, str) else source
        check_cloud(cloud, "it", least=2)
        chosen = farthest_points(to_unit_sphere(cloud), min(count, len(cloud)))
        distinct = list(dict.fromkeys(chosen.tolist()))  # it repeats a point when none is left
        return cloud[distinct]
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())

"""Packs a data set into smaller images and large files, once, to train from it faster.

python -m tools.pack /path/to/imagenet-1k /path/to/packed --short_side 288
"""

import sys
from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from input_pipeline.packing import UNREADABLE_FILE, Packing, pack
from runtime.errors import Parser, UserError, check_positive, program
from utils import cpu_cores


def parser() -> Parser:
    this = Parser("python -m tools.pack", description=__doc__.splitlines()[0])
    add = this.add_argument
    add("source", type=Path, help="class folders, or train/ and val/ that hold them")
    add("output", type=Path, help="a new folder, or one of a pack that was stopped")
    add("--format", choices=["tar", "folders", "wds"], default="tar",
        help="tar files, class folders, or shards of WebDataset (tar)")  # fmt: skip
    add("--short_side", "--short-side", type=int, default=Packing.short_side,
        help=f"pixels of larger images afterwards ({Packing.short_side})")  # fmt: skip
    add("--quality", type=int, default=Packing.quality, help=f"of JPEG ({Packing.quality})")
    add("--all_parts", "--all-parts", action="store_true",
        help="make evaluation images smaller, too; otherwise they are copied")  # fmt: skip
    add("--val_fraction", "--val-fraction", type=float, default=0, metavar="FRACTION",
        help="of a source without val/: hold out as main.py does (0)")  # fmt: skip
    add("--num_workers", "--num-workers", type=int, default=cpu_cores(),
        help="processes (all cores)")  # fmt: skip
    return this


@program(parser)
def main(arguments: Namespace) -> None:
    check_positive(arguments, "short_side", "num_workers")
    if not 1 <= arguments.quality <= 100:
        raise UserError(f"--quality {arguments.quality}: from 1 to 100")
    if not 0 <= arguments.val_fraction < 1:
        raise UserError(f"--val_fraction {arguments.val_fraction}: at least 0, less than 1")
    source, output = arguments.source, arguments.output
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"{output} is inside {source}: give a folder beside it")
    packing = Packing(
        arguments.format, arguments.short_side, arguments.quality, arguments.all_parts,
        arguments.val_fraction,
    )  # fmt: skip
    with tqdm(unit="image", disable=None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = pack(source, output, packing, arguments.num_workers, tell)
    sys.stdout.write(f"{output}: {found.images} images\n")
    if found.unreadable:
        listed = output / UNREADABLE_FILE
        sys.stdout.write(f"left out, unreadable: {found.unreadable}, in {listed}\n")
    if packing.format == "wds":
        splits = [
            f"--{part}_split '{part}-{{000000..{jobs - 1:06d}}}.tar|{images}'"
            for part, (jobs, images) in found.shards.items()
            if part in ("train", "val")
        ]
        flags = f"wds/ --data_path {output} --nb_classes {found.classes} {' '.join(splits)}"
    else:
        told = f"the pixels differ by at most {found.difference:.1f} of 255 on average"
        sys.stdout.write(f"in a sample of images, {told}\n")
        kind = "tar" if packing.format == "tar" else "image_folder"
        flags = f"{kind} --data_path {output}"
    if "val" not in found.shards:
        sys.stdout.write("no evaluation images: --val_fraction 0.2 holds some out\n")
        flags += " --disable_eval true"
    sys.stdout.write(f"next: python main.py --data_set {flags} ...\n")


if __name__ == "__main__":
    sys.exit(main())

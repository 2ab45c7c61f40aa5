"""scikit-learn's 1,797 handwritten digits as class folders: a data set without a download."""

from pathlib import Path

from PIL import Image

from runtime.errors import UserError
from runtime.files import written_whole


def write_digits(folder: Path, size: int = 32) -> None:
    """Write the digits, enlarged from 8 x 8 to `size` pixels, if there is no `folder` yet.

    train/ has four fifths of each class, val/ one fifth, chosen with a fixed seed.
    """
    if folder.exists():
        return
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target
    _, val = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(folder) as temporary:
            for index, label in enumerate(labels):
                target = temporary / ("val" if index in val else "train") / str(label)
                target.mkdir(parents=True, exist_ok=True)
                pixels = (digits.images[index] * 255 / 16).round().astype("uint8")
                scan = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
                scan.save(target / f"{index:04d}.png")
    except UserError:
        if not folder.is_dir():  # otherwise another machine has just written it
            raise

"""scikit-learn's 1,797 handwritten digits as image folders: a data set that needs no download."""

from pathlib import Path

from PIL import Image

from runtime.errors import UserError
from runtime.files import written_whole


def write_digits(folder: Path, size: int = 32) -> None:
    """Writes the digits, if `folder` is not there yet.

    train/<digit>/*.png holds four fifths of each class and val/<digit>/*.png one fifth, chosen with
    a fixed seed. The 8 x 8 scans are enlarged to `size` pixels.
    """
    if folder.exists():
        return
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(
        range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(folder) as temporary:
            for part, indices in (("train", train), ("val", val)):
                for index in indices:
                    target = temporary / part / str(digits.target[index])
                    target.mkdir(parents=True, exist_ok=True)
                    pixels = (digits.images[index] * 255 / 16).round().astype("uint8")
                    scan = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
                    scan.save(target / f"{index:04d}.png")
    except UserError:
        if not folder.is_dir():  # else another machine has written it meanwhile
            raise

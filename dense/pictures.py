"""Predictions drawn over an image, with the text of a legend."""

from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dense.predict import Predictor
from inference.labels import drawable, font_file, printable

SIDE = 896  # pixels of a picture's longer side, so that names are readable whatever the image
MASK_ALPHA = 0.5  # opacity of masks over the image

Color = tuple[int, int, int]


class Entry(NamedTuple):
    """A line of a legend: how much of the class there is, such as '3' or '41.5%'."""

    name: str
    color: Color
    amount: str


class Artist:
    """Predicts for an image and draws what is found; for one image at a time."""

    def __init__(self, predictor: Predictor) -> None:
        from mmdet.visualization import get_palette

        names = list(predictor.metainfo["classes"])
        palette = predictor.metainfo.get("palette")
        palette = [] if palette is None else [*map(tuple, palette)]
        # CocoDataset keeps COCO's 80 colours for more classes of one's own
        colors = get_palette(palette if len(palette) >= len(names) else "random", len(names))
        self.names, self.drawn = [*map(printable, names)], drawable(names)
        self.colors: list[Color] = [(int(r), int(g), int(b)) for r, g, b in colors]
        self.is_detector, self.color_type = predictor.is_detector, predictor.color_type
        # another threshold needs no other prediction
        self.sample = lru_cache(maxsize=1)(lambda file: predictor(file, 0).cpu())

    def __call__(self, file: str, threshold: float = 0.0) -> tuple[Image.Image, list[Entry]]:
        """Return the picture and its legend; UserError if the image cannot be used."""
        import mmcv

        sample = self.sample(file)
        image = mmcv.imread(file, flag=self.color_type, channel_order="rgb")
        image = Image.fromarray(image).convert("RGB")
        if self.is_detector:
            return self.detections(image, sample.pred_instances, threshold)
        return self.classes(image, sample.pred_sem_seg.data.squeeze(0).numpy())

    def detections(
        self, image: Image.Image, found: Any, threshold: float
    ) -> tuple[Image.Image, list[Entry]]:
        """Draw boxes, and masks if there are any, of mmdet's instances with a higher score."""
        found = found[found.scores > threshold].numpy()
        picture, scale = _resized(image)
        labels = found.labels.tolist()
        # the most certain one comes last, on top
        for mask, label in list(zip(found.get("masks", ()), labels, strict=False))[::-1]:
            shape = Image.fromarray((255 * MASK_ALPHA * mask).astype(np.uint8)).resize(picture.size)
            picture.paste(self.colors[label], mask=shape)
        pen = ImageDraw.Draw(picture)
        pen.font = ImageFont.truetype(str(font_file()), SIDE // 40)
        rows = list(zip(found.bboxes * scale, labels, found.scores, strict=True))
        for box, label, score in rows[::-1]:
            x, y, right, bottom = box.tolist()
            corners = x, y, max(x, right), max(y, bottom)  # untrained detectors give empty boxes
            pen.rectangle(corners, outline=self.colors[label], width=SIDE // 250)
            text = f" {self.drawn[label]} {score:.0%} "
            pen.rectangle(pen.textbbox((x, y), text), fill=self.colors[label])
            pen.text((x, y), text, fill=_contrast(self.colors[label]))
        return picture, [self._entry(label, str(n)) for label, n in Counter(labels).most_common()]

    def classes(self, image: Image.Image, labels: np.ndarray) -> tuple[Image.Image, list[Entry]]:
        """Lay the colours of a segmentor's labels (H, W) over the image."""
        picture, _ = _resized(image)
        colors = np.array(self.colors, np.uint8)[labels]
        mask = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
        drawn = Image.blend(picture, mask, MASK_ALPHA)
        counts = Counter(labels.ravel().tolist()).most_common()
        return drawn, [self._entry(label, f"{n / labels.size:.1%}") for label, n in counts]

    def _entry(self, label: int, amount: str) -> Entry:
        return Entry(self.names[label], self.colors[label], amount)


def _resized(image: Image.Image) -> tuple[Image.Image, float]:
    """Return the image with SIDE pixels on its longer side, and the factor.

    Small images keep their pixels as squares.
    """
    scale = SIDE / max(image.size)
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    return image.resize(size, how), scale


def _contrast(color: Color) -> str:
    red, green, blue = color
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 128 else "white"

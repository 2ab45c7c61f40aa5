"""Pictures of clouds, the images that P2P makes of them, and the votes of their views."""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datasets import Data
from input_pipeline.image_sets import ImageSet
from point_clouds.p2p import P2P
from point_clouds.projection import rotate, test_views

SHOWN = (0, 13, 26, 39)
"""Test views whose images are drawn."""


def draw_votes(model: P2P, data: Data, count: int = 8) -> Any:
    """Return a matplotlib Figure with a row per cloud, `count` of them from all classes.

    It shows the points, the learned images of four views, and how many of the 40 views vote for
    each class.
    """
    from matplotlib.figure import Figure

    clouds = data.val
    assert isinstance(clouds, ImageSet)
    assert clouds.labels is not None
    order = torch.argsort(clouds.labels, stable=True)  # all classes, evenly
    chosen = order[torch.arange(count) * len(order) // count].tolist()
    figure = Figure(figsize=(11, 1.9 * count), layout="constrained")
    views = test_views()
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    for row, index in enumerate(chosen):
        cloud, label = clouds[index]
        features = model.point_features(cloud[None])
        images = torch.cat([model.enc.image(features, rotate(cloud[None], v)) for v in views])
        logits = model.base_model(images)
        votes = torch.bincount(logits.argmax(dim=1), minlength=len(data.classes))
        vote = int(logits.mean(dim=0).argmax())
        axes = figure.add_subplot(count, 6, 6 * row + 1, projection="3d")
        axes.scatter(*cloud.T.numpy(), s=1, c=cloud[:, 2].numpy())
        axes.set_axis_off()
        axes.set_title(data.classes[label], fontsize=9, parse_math=False)
        for place, view in enumerate(SHOWN):
            axes = figure.add_subplot(count, 6, 6 * row + 2 + place)
            axes.imshow((images[view] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
            axes.set_axis_off()
            axes.set_title(data.classes[int(logits[view].argmax())], fontsize=8, parse_math=False)
        axes = figure.add_subplot(count, 6, 6 * row + 6)
        axes.barh(range(len(votes)), votes.numpy(), color=["C0" if c == vote else "0.7"
                  for c in range(len(votes))])  # fmt: skip
        axes.set_yticks(range(len(votes)), data.classes, fontsize=6)
        axes.set_xlim(0, len(views))
        axes.tick_params(axis="x", labelsize=6)
        axes.set_title(f"vote: {data.classes[vote]}", fontsize=9, parse_math=False)
    return figure

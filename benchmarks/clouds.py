"""P2P's shortcuts against its plain form: nine copies of each point, features of every edge."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, kept_bytes, paired, peak_bytes, speed
from point_clouds.p2p import EdgeConv, Encoder, nearest
from point_clouds.projection import centre_pixels, rotate, splat, test_views

CLOUDS, POINTS, SIZE = 4, 2048, 192
VIEWS = 8


def plain_edge_conv(layer: EdgeConv, features: Tensor, neighbours: Tensor) -> Tensor:
    """Compute the same from a tensor of all edges, as the published code does."""
    batch = torch.arange(len(features), device=features.device)[:, None, None]
    of_neighbours = features[batch, neighbours]
    of_centres = features[:, :, None].expand_as(of_neighbours)
    edges = torch.cat((of_neighbours - of_centres, of_centres), dim=-1).permute(0, 3, 1, 2)
    return nn.Sequential.forward(layer, edges).amax(dim=-1).mT


def plain_splat(features: Tensor, centres: Tensor, size: int) -> Tensor:
    """Scatter nine copies of each point, as the published code does."""
    steps = torch.arange(-1, 2, device=centres.device)
    pixels = centres[:, :, None] + torch.cartesian_prod(steps, steps)
    index = (pixels[..., 0] * size + pixels[..., 1]).flatten(1)[..., None]
    nine = features.repeat_interleave(9, dim=1)
    maps = features.new_zeros(len(features), size * size, features.shape[-1])
    maps = maps.scatter_add(1, index.expand_as(nine), nine)
    return maps.mT.unflatten(-1, (size, size)).contiguous()


def clouds(rounds: int, device: torch.device) -> Iterator[Row]:
    """Compare both forms of the graph convolution and of the projection, and of several views."""
    torch.manual_seed(0)
    encoder = Encoder(SIZE, SIZE, local_size=32, trans_dim=8, graph_dim=64).to(device)
    cloud = torch.randn(CLOUDS, POINTS, 3, device=device)
    layer, neighbours = encoder.graph_layer, nearest(cloud, 32)
    narrow = torch.randn(CLOUDS, POINTS, 8, device=device)
    wide = torch.randn(CLOUDS, POINTS, 64, device=device)
    centres = centre_pixels(cloud, SIZE)
    case = f"{CLOUDS} clouds of {POINTS} points"
    forms: dict[str, dict[str, Any]] = {
        "graph convolution": {
            "ours": partial(layer, narrow, neighbours),
            "peer": partial(plain_edge_conv, layer, narrow, neighbours),
        },
        f"projection to {SIZE} pixels": {
            "ours": partial(splat, wide, centres, SIZE),
            "peer": partial(plain_splat, wide, centres, SIZE),
        },
    }
    for what, run in forms.items():
        for values in (narrow, wide):
            values.requires_grad_(True)
        yield Row(case, f"{what}, training", *_speed(_trained(run), rounds, device))
        own, peer = (kept_bytes(run[name], device) for name in ("ours", "peer"))
        details = f"{own / 2**20:.1f} MB, peer {peer / 2**20:.1f} MB"
        yield Row(case, f"{what}, memory kept for training, share", own / peer, details)
        for values in (narrow, wide):
            values.requires_grad_(False)
        with torch.inference_mode():
            yield Row(case, f"{what}, evaluation", *_speed(run, rounds, device))
            own, peer = (peak_bytes(run[name], device) for name in ("ours", "peer"))
        details = f"{own / 2**20:.1f} MB, peer {peer / 2**20:.1f} MB"
        yield Row(case, f"{what}, peak memory of evaluation, share", own / peer, details)
    with torch.inference_mode():
        views = {"ours": partial(_views, encoder, cloud, True),
                 "peer": partial(_views, encoder, cloud, False)}  # fmt: skip
        yield Row(
            f"{case}, {VIEWS} views of {SIZE} pixels", "points to maps, features once per cloud",
            *_speed(views, rounds, device),
        )  # fmt: skip


def _trained(run: dict[str, Any]) -> dict[str, Any]:
    return {
        name: lambda forward=forward: forward().sum().backward() for name, forward in run.items()
    }


def _speed(run: dict[str, Any], rounds: int, device: torch.device) -> tuple[float, str]:
    timings = paired(run, rounds, device)
    return speed(timings["ours"], timings["peer"])


def _views(encoder: Encoder, cloud: Tensor, shares: bool) -> None:
    for number, view in enumerate(test_views()[:VIEWS].to(cloud)):
        if number == 0 or not shares:
            features = encoder.point_features(cloud)
        splat(features, centre_pixels(rotate(cloud, view), SIZE), SIZE)

"""mmpretrain's HorNet as a peer; needs mmpretrain and mmcv.

python -m benchmarks training --peer benchmarks/mmpretrain_peer.py
"""

import re
from functools import partial
from typing import Any

from mmpretrain.models.backbones import HorNet
from torch import Tensor, nn


class Classifier(nn.Module):
    """The backbone and a head, with the state-dict keys of the released checkpoints."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.backbone = HorNet(arch)
        self.head = nn.Linear(8 * self.backbone.arch_settings["base_dim"], 1000)

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        renamed = {}
        for name, value in super().state_dict(*arguments, **keywords).items():
            name = name.removeprefix("backbone.").replace(".projs.", ".pws.")
            name = re.sub(r"(gamma\d)\.weight", r"\1", name)
            renamed[re.sub(r"^norm3\.", "norm.", name)] = value
        return renamed

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].flatten(1))


MODELS = {
    f"hornet_{size}_{kind}": partial(Classifier, size + suffix)
    for size in ("tiny", "small", "base", "large")
    for kind, suffix in (("7x7", ""), ("gf", "-gf"))
}

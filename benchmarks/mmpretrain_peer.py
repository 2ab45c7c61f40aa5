"""mmpretrain's HorNet as a peer, where mmpretrain and mmcv are installed: --peer this file."""

import re
from functools import partial
from typing import Any

from mmpretrain.models.backbones import HorNet
from torch import Tensor, nn

from benchmarks.peers import register


class Classifier(nn.Module):
    """The backbone and a head, with the parameter names of the released checkpoints."""

    def __init__(self, arch: str, num_classes: int = 1000, **_: Any) -> None:
        super().__init__()
        self.backbone = HorNet(arch)
        last = self.backbone.arch_settings["base_dim"] * 8
        self.head = nn.Linear(last, num_classes)

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """Under the released names: pws for projs, gammas without modules of their own."""
        found = super().state_dict(*arguments, **keywords)
        renamed = {}
        for name, value in found.items():
            name = name.removeprefix("backbone.").replace(".projs.", ".pws.")
            name = re.sub(r"(gamma\d)\.weight", r"\1", name)
            renamed[re.sub(r"^norm3\.", "norm.", name)] = value
        return renamed

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].flatten(1))


__all__: list[str] = []
for _size in ("tiny", "small", "base", "large"):
    register(f"hornet_{_size}_7x7", partial(Classifier, _size), __name__)
    register(f"hornet_{_size}_gf", partial(Classifier, f"{_size}-gf"), __name__)

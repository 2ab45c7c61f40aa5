"""The plain HorNet as a peer: registered with timm under the usual names, like any other's file.

For benchmarks.peers alone, which keeps these names apart from those of this project's models.
"""

from timm.models import register_model

from benchmarks.plain_hornet import PlainHorNet

FILTERS = {224: (None, None, (14, 8), (7, 4)), 384: (None, None, (24, 13), (12, 7))}


def _register(name: str, base_dim: int, filters) -> None:
    def create(
        pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs
    ):
        return PlainHorNet(base_dim, filters, **kwargs)

    create.__name__ = name
    create.__module__ = __name__
    register_model(create)


__all__: list[str] = []
for _size, _base_dim in {"tiny": 64, "small": 96, "base": 128, "large": 192}.items():
    _register(f"hornet_{_size}_7x7", _base_dim, (None,) * 4)
    _register(f"hornet_{_size}_gf", _base_dim, FILTERS[224])
    if _size in ("base", "large"):
        _register(f"hornet_{_size}_gf_img384", _base_dim, FILTERS[384])

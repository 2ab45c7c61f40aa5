"""The plain HorNet as a peer: registered with timm under the usual names, like any other's file.

For benchmarks.peers alone, which keeps these names apart from those of this project's models.
"""

from functools import partial

from benchmarks.peers import register
from benchmarks.plain_hornet import PlainHorNet

FILTERS = {224: (None, None, (14, 8), (7, 4)), 384: (None, None, (24, 13), (12, 7))}


__all__: list[str] = []
for _size, _base_dim in {"tiny": 64, "small": 96, "base": 128, "large": 192}.items():
    register(f"hornet_{_size}_7x7", partial(PlainHorNet, _base_dim, (None,) * 4), __name__)
    register(f"hornet_{_size}_gf", partial(PlainHorNet, _base_dim, FILTERS[224]), __name__)
    if _size in ("base", "large"):
        large = partial(PlainHorNet, _base_dim, FILTERS[384])
        register(f"hornet_{_size}_gf_img384", large, __name__)

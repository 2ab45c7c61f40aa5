"""Names and shapes of HorNet's weights in other projects: mmpretrain, keras_cv_attention_models."""

import re
from typing import Any

import torch
from torch import Tensor

_MMPRETRAIN = (
    (r"\.gnconv\.projs\.", ".gnconv.pws."),
    (r"\.(gamma[12])\.weight$", r".\1"),
)
_MMPRETRAIN_CLASSIFIER = ((r"^backbone\.norm3\.", "norm."), (r"^head\.fc\.", "head."))


def from_mmpretrain(weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights of mmpretrain's HorNet under the release's names, others as they are.

    Of a classifier, the prefix 'backbone.' is removed, too. The shapes are the same.
    """
    marks = re.compile(r"\.gnconv\.projs\.|\.gamma1\.weight$")
    if not all(isinstance(name, str) for name in weights) or not any(map(marks.search, weights)):
        return weights
    bare = {name.removeprefix("module."): value for name, value in weights.items()}
    is_classifier = all(re.match(r"backbone\.(?!norm[0-2])|head\.fc\.", name) for name in bare)
    rules = _MMPRETRAIN + (_MMPRETRAIN_CLASSIFIER if is_classifier else ())
    out = {}
    for name, value in bare.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name.removeprefix("backbone.") if is_classifier else name] = value
    return out


def to_mmpretrain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a HorNet's weights under the names of mmpretrain's classifier."""
    out = {}
    for name, value in weights.items():
        name = re.sub(r"\.gnconv\.pws\.", ".gnconv.projs.", name)
        name = re.sub(r"\.(gamma[12])$", r".\1.weight", name)
        name = re.sub(r"^norm\.", "norm3.", name)
        out[re.sub(r"^backbone\.head\.", "head.fc.", f"backbone.{name}")] = value
    return out


_KERAS_BLOCK = {
    "attn_ln": "norm1",
    "gnconv_pre_conv": "gnconv.proj_in",
    "gnconv_list_dw_conv": "gnconv.dwconv",
    "gnconv_gf_pre_ln": "gnconv.dwconv.pre_norm",
    "gnconv_gf_dw_conv": "gnconv.dwconv.dw",
    "gnconv_gf_complex_dense": "gnconv.dwconv",
    "gnconv_gf_post_ln": "gnconv.dwconv.post_norm",
    "gnconv_output_conv": "gnconv.proj_out",
    "1_gamma": "gamma1",
    "mlp_ln": "norm2",
    "mlp_Dense_0": "pwconv1",
    "mlp_Dense_1": "pwconv2",
    "2_gamma": "gamma2",
}
_KERAS_KINDS = {"kernel": "weight", "depthwise_kernel": "weight", "gamma": "weight", "beta": "bias"}


def from_keras(weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of keras_cv_attention_models' HorNet, {layer: {name: value}}, as ours.

    Raises ValueError for a layer that a HorNet does not have.
    """
    return {
        f"{_keras_layer(layer)}{_keras_name(layer, name)}": _keras_value(name, value)
        for layer, own in weights.items()
        for name, value in own.items()
    }


def _keras_layer(layer: str) -> str:
    if found := re.fullmatch(r"stack(\d+)_block(\d+)_(.+)", layer):
        stage, block, part = int(found[1]) - 1, int(found[2]) - 1, found[3]
        if number := re.fullmatch(r"gnconv_pw(\d+)_conv", part):
            return f"stages.{stage}.{block}.gnconv.pws.{int(number[1]) - 1}"
        if part in _KERAS_BLOCK:
            return f"stages.{stage}.{block}.{_KERAS_BLOCK[part]}"
    if found := re.fullmatch(r"(?:stem|stack(\d+))_(conv|ln)", layer):
        stage = int(found[1] or 1) - 1
        # the stem's norm is after its convolution
        is_second = (found[2] == "ln") == (stage == 0)
        return f"downsample_layers.{stage}.{int(is_second)}"
    known = {"pre_output_ln": "norm", "predictions": "head"}
    if layer not in known:
        raise ValueError(f"no HorNet has a layer {layer}")
    return known[layer]


def _keras_name(layer: str, name: str) -> str:
    return "" if layer.endswith("_gamma") else f".{_KERAS_KINDS.get(name, name)}"


def _keras_value(name: str, value: Tensor) -> Tensor:
    orders = {
        ("kernel", 2): (1, 0),
        ("kernel", 4): (3, 2, 0, 1),
        ("depthwise_kernel", 4): (2, 3, 0, 1),
        ("complex_weight", 4): (3, 1, 2, 0),
    }
    order = orders.get((name, value.ndim))
    return value.permute(order).contiguous() if order else torch.clone(value)

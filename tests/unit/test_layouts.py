"""Weights of mmpretrain and keras_cv_attention_models, renamed by their projects' own rules."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch

import models
from checkpoints.fitting import load_start_weights, own_names
from checkpoints.reading import read_checkpoint, weights_in
from checkpoints.sources import local_file
from config.flags import FinetuneConfig
from inference.classifier import load_classifier
from models import layouts, variants
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError
from tests.golden.formula import fill_by_formula, formula_input
from tools.convert import main

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = json.loads((GOLDEN / "state_dict_layouts.json").read_text())
SMALL = {"base_dim": 16, "depths": (1, 1, 1, 1)}


def to_mmpretrain(weights):
    """By the rules of mmpretrain's converter, hornet2mmpretrain."""
    out = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "head":
            parts = ["head", "fc", *parts[1:]]
        else:
            parts = ["backbone", *("norm3" if p == "norm" else p for p in parts)]
        parts = ["projs" if part == "pws" else part for part in parts]
        if parts[-1].startswith("gamma"):
            parts.append("weight")
        out[".".join(parts)] = value
    return out


def to_keras(weights, path, whole):
    """A file with the layers that the source of keras_cv_attention_models names."""

    def layer_of(name):
        *parts, _ = name.split(".") if not re.search(r"gamma\d$", name) else [*name.split("."), ""]
        if parts[0] == "downsample_layers":
            stage, is_second = int(parts[1]), parts[2] == "1"
            kind = "ln" if is_second == (stage == 0) else "conv"
            return f"stack{stage + 1}_{kind}" if stage else f"stem_{kind}"
        if parts[0] != "stages":
            return {"norm": "pre_output_ln", "head": "predictions"}[parts[0]]
        start, part = f"stack{int(parts[1]) + 1}_block{int(parts[2]) + 1}_", ".".join(parts[3:])
        if part.startswith("gnconv.pws."):
            return f"{start}gnconv_pw{int(parts[-1]) + 1}_conv"
        if part == "gnconv.dwconv":
            is_filter = name.endswith("complex_weight")
            return start + ("gnconv_gf_complex_dense" if is_filter else "gnconv_list_dw_conv")
        return start + {
            "gamma1": "1_gamma", "gamma2": "2_gamma", "norm1": "attn_ln", "norm2": "mlp_ln",
            "pwconv1": "mlp_Dense_0", "pwconv2": "mlp_Dense_1", "gnconv.proj_in": "gnconv_pre_conv",
            "gnconv.proj_out": "gnconv_output_conv", "gnconv.dwconv.dw": "gnconv_gf_dw_conv",
            "gnconv.dwconv.pre_norm": "gnconv_gf_pre_ln",
            "gnconv.dwconv.post_norm": "gnconv_gf_post_ln",
        }[part]  # fmt: skip

    with h5py.File(path, "w") as file:
        if whole:
            file.create_group("optimizer_weights").create_dataset("iter:0", data=3)
        root = file.create_group("model_weights") if whole else file
        for name, tensor in weights.items():
            layer, value, own = layer_of(name), tensor.numpy(), name.split(".")[-1]
            if own == "complex_weight":
                value = np.stack([value[..., i].transpose(1, 2, 0) for i in range(2)])
            elif own.startswith("gamma"):
                own = "weight"
            elif layer.endswith("_ln"):
                own = {"weight": "gamma", "bias": "beta"}[own]
            elif own == "weight" and layer.endswith("dw_conv"):
                own, value = "depthwise_kernel", value.transpose(2, 3, 0, 1)
            elif own == "weight":
                own, value = "kernel", value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
            root.create_dataset(f"{layer}/{layer}/{own}:0", data=value)


def logits(model):
    with torch.no_grad():
        return model.eval()(formula_input(2, 224, 224))


@pytest.fixture(scope="module")
def golden():
    """HorNet-T with global filters, filled by the formula, and its recorded logits."""
    expected = torch.from_numpy(np.load(GOLDEN / "hornet_tiny_gf_224x224.npz")["logits"])
    return fill_by_formula(timm.create_model("hornet_tiny_gf")).state_dict(), expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_of_mmpretrain_are_those_of_the_release(name):
    own = {key: index for index, key in enumerate(LAYOUTS[name])}
    theirs = to_mmpretrain(own)
    assert layouts.from_mmpretrain(theirs) == own
    assert layouts.to_mmpretrain(own) == theirs
    assert len(theirs.keys() & {f"backbone.{key}" for key in own}) == len(own) - 194
    wrapped = {f"module.{key}": value for key, value in theirs.items()}
    assert layouts.from_mmpretrain(wrapped) == own
    assert layouts.from_mmpretrain(own) is own
    strange = theirs | {3: 4}
    assert layouts.from_mmpretrain(strange) is strange


def test_norms_of_a_detectors_maps_stay():
    own = timm.create_model("hornet_atto_7x7", **SMALL).state_dict()
    detector = {key: value for key, value in to_mmpretrain(own).items() if "norm3" not in key
                and "head" not in key}  # fmt: skip
    norms = {f"backbone.norm{i}.{kind}": torch.ones(16 * 2**i) for i in range(4)
             for kind in ("weight", "bias")}  # fmt: skip
    for rest in ({"neck.conv.weight": torch.ones(1)}, {}):  # or its backbone alone
        found = layouts.from_mmpretrain(detector | norms | rest)
        assert norms.keys() <= found.keys()
        assert "backbone.stages.0.0.gnconv.pws.0.weight" in found


def test_start_weights_of_a_detector_with_mmpretrains_backbone(tmp_path):
    model = timm.create_model("hornet_atto_7x7", **SMALL)
    saved = {key: value + 1 for key, value in to_mmpretrain(model.state_dict()).items()
             if not key.startswith(("backbone.norm3", "head."))}  # fmt: skip
    norms = {f"backbone.norm{i}.weight": torch.full((16 * 2**i,), 7.0) for i in range(4)}
    torch.save({"state_dict": saved | norms | {"neck.w": torch.ones(1)}}, tmp_path / "d.pth")
    before = model.norm.weight.clone()
    start = FinetuneConfig(finetune=str(tmp_path / "d.pth"))
    load_start_weights(model, start, ["0", "1"], SINGLE_PROCESS, named=False)
    assert torch.equal(model.norm.weight, before)
    assert torch.equal(model.stages[0][0].gamma1, saved["backbone.stages.0.0.gamma1.weight"])


@pytest.mark.parametrize("wrap", [dict, lambda w: {"state_dict": w, "meta": {"epoch": 1}}])
def test_recorded_logits_of_weights_of_mmpretrain(golden, tmp_path, wrap):
    own, expected = golden
    path = tmp_path / "theirs.pth"
    torch.save(wrap(to_mmpretrain(own)), path)
    limit = 1e-5 * expected.abs().max()
    model = timm.create_model("hornet_tiny_gf")
    start = FinetuneConfig(finetune=str(path))
    classes = [str(i) for i in range(1000)]
    load_start_weights(model, start, classes, SINGLE_PROCESS, named=False)
    assert (logits(model) - expected).abs().max() < limit
    overlay = {"file": str(path)}
    loaded = timm.create_model("hornet_tiny_gf", pretrained=True, pretrained_cfg_overlay=overlay)
    weights = own_names(weights_in(read_checkpoint(path), path), model)  # as by --eval --resume
    for name, value in own.items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(weights[name], value)


def test_there_and_back(tmp_path, capsys):
    model = timm.create_model("hornet_atto_gf", num_classes=3, **SMALL)
    flags = {"model": "hornet_atto_gf", "model_kwargs": SMALL, "input_size": 64}
    state = {"model": model.state_dict(), "args": flags, "classes": ["ant", "bee", "cat"]}
    torch.save(state, tmp_path / "own.pth")
    theirs = tmp_path / "theirs.pth"
    assert main([str(tmp_path / "own.pth"), str(theirs), "--layout", "mmpretrain"]) == 0
    saved = torch.load(theirs, weights_only=True)["state_dict"]
    assert saved.keys() == to_mmpretrain(model.state_dict()).keys()
    assert main([str(theirs), str(tmp_path / "back.safetensors")]) == 0
    back = load_classifier(str(tmp_path / "back.safetensors"))
    assert back.classes == ["ant", "bee", "cat"]
    for name, value in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], value)
    folder = [str(tmp_path / "own.pth"), str(tmp_path / "folder"), "--layout", "mmpretrain"]
    assert main(folder) == 1
    assert "--layout mmpretrain is for FILE.pth" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_keras(tmp_path, whole):
    for name in ("hornet_atto_7x7", "hornet_atto_gf"):
        own = timm.create_model(name, num_classes=5, **SMALL).state_dict()
        own = {key: torch.randn_like(value) for key, value in own.items()}
        path = tmp_path / f"{name}.h5"
        to_keras(own, path, whole)
        found = weights_in(read_checkpoint(path), path)
        assert found.keys() == own.keys()
        for key, value in own.items():
            assert torch.equal(found[key], value), key
    with h5py.File(path, "a") as file:
        root = file.get("model_weights", file)
        root.create_dataset("stem_bn/stem_bn/gamma:0", data=np.ones(3))
    with pytest.raises(UserError, match="is of another model: no HorNet has a layer stem_bn"):
        read_checkpoint(path)
    with h5py.File(path, "a") as file:
        root = file.get("model_weights", file)
        del root["stem_bn"]
        root.create_dataset("loose", data=np.ones(3))
    with pytest.raises(UserError, match="is of another model: no HorNet has a layer"):
        read_checkpoint(path)
    with h5py.File(path, "a") as file:
        file.create_dataset("model_weights/a/b", (20000, 20000), chunks=(100, 100))
        file.get("model_weights", file).create_dataset("c/d", (20000, 20000), chunks=(100, 100))
    with pytest.raises(UserError, match=r"cannot be read: .* bytes unpack to"):
        read_checkpoint(path)
    (tmp_path / "secret").write_bytes(bytes(48))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        outside = [(str(tmp_path / "secret"), 0, 48)]
        file.create_dataset("a/b", (12,), np.float32, external=outside)
    with pytest.raises(UserError, match="it refers to other files"):
        read_checkpoint(tmp_path / "other.h5")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.h5 cannot be read"):
        read_checkpoint(path)


class TestSecondAddress:
    @pytest.fixture
    def addresses(self, server, monkeypatch):
        """Both addresses are those of the server; returns the path of the second."""
        monkeypatch.setattr(variants, "_ADDRESS", server.address + "/f/{}/?dl=1")
        monkeypatch.setattr(variants, "_MMPRETRAIN", server.address + "/mm/")
        return "/mm/" + variants.MMPRETRAIN_FILES["hornet_tiny_7x7"]

    def test_is_used_if_the_first_fails(self, server, addresses, hub, monkeypatch, tmp_path):
        own = timm.create_model("hornet_tiny_7x7").state_dict()
        torch.save(to_mmpretrain(own), tmp_path / "theirs.pth")
        server.pages[addresses] = (tmp_path / "theirs.pth").read_bytes()
        with pytest.raises(RuntimeError, match="its SHA-256 .* does not begin with 0e8eedff"):
            models.download_published("hornet_tiny_7x7")
        assert not [*hub.iterdir()]
        digest = models.pretrained._sha256(tmp_path / "theirs.pth")[:8]
        changed = addresses.replace("0e8eedff", digest)
        server.pages[changed] = server.pages.pop(addresses)
        file = changed.removeprefix("/mm/")
        monkeypatch.setitem(variants.MMPRETRAIN_FILES, "hornet_tiny_7x7", file)
        path = local_file("hornet_tiny_7x7.in1k")
        assert (path.name, path.parent) == (file, hub)
        loaded = timm.create_model("hornet_tiny_7x7", pretrained=True).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in own.items())
        # the second is in the cache: nothing is asked for again
        first = f"/f/{variants.VARIANTS['hornet_tiny_7x7'].weights[1]}/?dl=1"
        assert server.requests == [first, addresses, first, changed]

    def test_both_fail(self, addresses):
        with pytest.raises(UserError, match=r"could not be downloaded.*/mm/hornet-tiny_3rdparty"):
            local_file("hornet_tiny_7x7.in1k")


def test_files_of_mmengine_are_read_without_their_objects(tmp_path):
    """What a Runner of mmengine saves beside the weights, pickled as its classes would be."""

    class HistoryBuffer:
        pass

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    import sys
    from types import ModuleType

    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    kept = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = ModuleType(name)
        sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
        buffer = HistoryBuffer()
        buffer.history = np.ones(3)
        hub = {"log_scalars": {"loss": buffer}, "runtime_info": {"best": np.float64(0.5)}}
        weights = timm.create_model("hornet_atto_7x7", **SMALL).state_dict()
        state = {"state_dict": to_mmpretrain(weights), "message_hub": hub, "meta": {}}
        torch.save(state, tmp_path / "run.pth")
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module:
                sys.modules[name] = module
    checkpoint = read_checkpoint(tmp_path / "run.pth")
    assert checkpoint["message_hub"] == {"log_scalars": {}, "runtime_info": {"best": 0.5}}
    found = weights_in(checkpoint, tmp_path / "run.pth")
    assert all(torch.equal(found[name], value) for name, value in weights.items())

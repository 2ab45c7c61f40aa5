"""Weights behind an address: fetched once, under a name of ours; what fails is one line."""

import hashlib
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import models
from checkpoints.sources import local_file
from models.pretrained import imagenet1k_in_22k
from models.variants import IMAGENET_22K, VARIANTS
from runtime.distributed import DistributedContext
from runtime.errors import UserError

SMALL = {"base_dim": 16, "depths": (1, 1, 1, 1)}
CPU = DistributedContext(0, 0, 1, torch.device("cpu"))


def weights(tmp_path, num_classes=1000, wrap=lambda w: {"model": w}, name="hornet_atto_gf"):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=num_classes, **SMALL)
    torch.save(wrap(model.state_dict()), tmp_path / "saved.pth")
    return model, (tmp_path / "saved.pth").read_bytes()


def test_address_without_a_file_name(server, hub, tmp_path):
    _, server.pages["/f/abc/?dl=1"] = weights(tmp_path)
    address = f"{server.address}/f/abc/?dl=1"
    first, second = models.download(address), models.download(address)
    assert first == second
    assert server.requests == ["/f/abc/?dl=1"]
    assert first.read_bytes() == server.pages["/f/abc/?dl=1"]
    assert first.parent == hub
    assert first.suffix == ".pth"
    digest = hashlib.sha256(server.pages["/f/abc/?dl=1"]).hexdigest()
    checksum = first.with_name(f"{first.name}.sha256")
    assert checksum.read_text() == f"{digest}  {first.name}\n"
    assert sorted(hub.iterdir()) == [first, checksum]
    assert local_file(address, CPU) == first
    # damage of the same length is noticed
    first.write_bytes(bytes(len(first.read_bytes())))
    assert models.download(address).read_bytes() == server.pages["/f/abc/?dl=1"]
    assert len(server.requests) == 2


def test_processes_with_the_same_id_share_a_cache(server, hub, monkeypatch):
    """As on two machines: each writes a file of its own before it gets its name."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    server.pages["/w.pth"] = os.urandom(2**20)
    written = []
    copy = shutil.copyfileobj

    def slowly(source, target):
        written.append(target.name)
        barrier.wait()
        copy(source, target)

    barrier = threading.Barrier(2)
    monkeypatch.setattr(shutil, "copyfileobj", slowly)
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(models.download, 2 * [f"{server.address}/w.pth"]))
    assert len(set(written)) == 2
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == server.pages["/w.pth"]


def test_names_in_the_cache_differ_and_keep_their_suffix(server):
    server.pages |= {"/a/w.safetensors": b"a", "/b/w.safetensors": b"b", "/a/?dl=1": b"c"}
    paths = [models.download(server.address + page) for page in server.pages]
    assert [path.read_bytes() for path in paths] == [b"a", b"b", b"c"]
    assert [path.suffix for path in paths] == [".safetensors", ".safetensors", ".pth"]


@pytest.mark.parametrize(
    ("page", "missing_bytes", "reason"),
    [
        (None, 0, "404"),
        (b"<!DOCTYPE html>", 0, "a web page"),
        (b"", 0, "a web page"),
        (b"PK half", 9, "ended early"),
    ],
)
def test_failed_download_names_the_manual_way(server, hub, page, missing_bytes, reason):
    server.missing_bytes = missing_bytes
    if page is not None:
        server.pages["/?dl=1"] = page
    address = f"{server.address}/?dl=1"
    with pytest.raises(UserError, match=reason) as caught:
        local_file(address, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(rf"{re.escape(address)} could not.*save the file as {hub}/\w+\.pth$", message)
    assert list(hub.iterdir()) == []


def test_no_server_and_no_address(hub):
    with pytest.raises(UserError, match="refused"):
        local_file("http://127.0.0.1:9/w.pth", CPU)
    with pytest.raises(UserError, match="could not be downloaded"):
        local_file("http://", CPU)


@pytest.mark.parametrize(
    "wrap",
    [lambda w: {"model": w}, lambda w: {"model": {f"module.{k}": v for k, v in w.items()}}],
)
def test_timm_loads_released_weights(server, tmp_path, wrap):
    saved, server.pages["/f/x/?dl=1"] = weights(tmp_path, 7, wrap)
    overlay = {"url": f"{server.address}/f/x/?dl=1"}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **SMALL}
    model = timm.create_model("hornet_atto_gf", **options)
    assert model.num_classes == 7
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert "state_dict" not in model.pretrained_cfg
    other = timm.create_model("hornet_atto_gf", num_classes=3, in_chans=1, **options)
    torch.testing.assert_close(other.norm.weight, saved.norm.weight)
    stem = "downsample_layers.0.0.weight"
    torch.testing.assert_close(other.state_dict()[stem], saved.state_dict()[stem].sum(1, True))
    pyramid = timm.create_model("hornet_atto_gf", features_only=True, **options)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(pyramid(image)[-1], saved.forward_features(image))
    assert len(server.requests) == 1


def test_imagenet22k_weights_have_their_own_class_count(server, tmp_path):
    saved, server.pages["/?dl=1"] = weights(tmp_path, IMAGENET_22K + 1)
    overlay = {"url": f"{server.address}/?dl=1"}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **SMALL}
    assert timm.create_model("hornet_atto_gf", **options).num_classes == IMAGENET_22K + 1
    model = timm.create_model("hornet_atto_gf", num_classes=1000, **options)
    torch.testing.assert_close(model.head.weight, saved.head.weight[imagenet1k_in_22k()])


def test_large_head_that_is_not_of_imagenet22k(server, tmp_path):
    saved, server.pages["/?dl=1"] = weights(tmp_path, 1500)
    overlay = {"url": f"{server.address}/?dl=1"}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **SMALL}
    model = timm.create_model("hornet_atto_gf", num_classes=1000, **options)
    assert not torch.allclose(model.head.weight, saved.head.weight[:1000])
    torch.testing.assert_close(model.norm.weight, saved.norm.weight)


def test_damaged_weights_in_the_cache_are_named(server):
    server.pages["/?dl=1"] = b"PK nothing"
    overlay = {"url": f"{server.address}/?dl=1"}
    with pytest.raises(RuntimeError, match=r"\.pth can't be read .*: remove it"):
        timm.create_model("hornet_atto_gf", pretrained=True, pretrained_cfg_overlay=overlay)


def test_published_names_and_their_files(hub, monkeypatch):
    asked = []
    monkeypatch.setattr("models.variants.download", lambda *args: asked.append(args) or hub / "x")
    for name in ("hornet_large_gf", "hornet_large_gf.in22k", "hornet_tiny_7x7.in1k"):
        assert local_file(name, CPU) == hub / "x"
    assert [file_name for _, file_name in asked] == [
        *["hornet_large_gf.in22k.pth"] * 2,
        "hornet_tiny_7x7.in1k.pth",
    ]
    assert models.download_published("hornet_tiny_7x7.in22k") is None
    assert models.download_published("hornet_atto_7x7") is None
    assert models.download_published("convnext_tiny") is None


def test_class_count_without_weights():
    with torch.device("meta"):
        assert timm.create_model("hornet_large_7x7").num_classes == 1000
        assert timm.create_model("hornet_large_7x7.in22k").num_classes == IMAGENET_22K
    assert max(imagenet1k_in_22k()) < IMAGENET_22K


def test_every_variant_with_weights_is_offered_by_timm():
    offered = set(timm.list_pretrained("hornet_*"))
    assert offered == {f"{n}.{row.weights[0]}" for n, row in VARIANTS.items() if row.weights}

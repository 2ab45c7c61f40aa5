"""--finetune: where weights come from, what is fitted, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import models
from checkpoints.fitting import load_start_weights
from config.flags import FinetuneConfig
from models.pretrained import imagenet1k_in_22k
from runtime.distributed import DistributedContext
from runtime.errors import UserError

SMALL = {"base_dim": 16, "depths": (1, 1, 1, 1)}


CPU = DistributedContext(0, 0, 1, torch.device("cpu"))


def small(num_classes=5, name="hornet_atto_gf", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **SMALL, **kwargs)


def start(model, classes=None, named=True, **flags):
    classes = classes or [f"class{label}" for label in range(model.num_classes)]
    load_start_weights(model, FinetuneConfig(**flags), classes, CPU, named)


def assert_same(model, expected):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(
    ("content", "config"),
    [
        (lambda w: {"model": w, "model_ema": {}}, {}),
        (lambda w: {"module": w}, {}),
        (lambda w: w, {}),
        (lambda w: {"model_ema": w}, {}),
        (lambda w: {"model": {}, "model_ema": w}, {"model_key": "model_ema|model"}),
        (lambda w: {"model": {f"module.{k}": v for k, v in w.items()}}, {}),
        (lambda w: {"model": {f"_orig_mod.module.{k}": v for k, v in w.items()}}, {}),
        (lambda w: {f"backbone.{k}": v for k, v in w.items()}, {}),
        (
            lambda w: {f"net.{k}": v for k, v in w.items()} | {"other": torch.ones(1)},
            {"model_prefix": "net."},
        ),
    ],
)
def test_weights_are_found(tmp_path, content, config):
    weights = small(seed=1).state_dict()
    torch.save(content(weights), tmp_path / "w.pth")
    model = small()
    start(model, finetune=str(tmp_path / "w.pth"), **config)
    assert_same(model, weights)


def test_safetensors(tmp_path):
    weights = small(seed=1).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    model = small()
    start(model, finetune=str(tmp_path / "w.safetensors"))
    assert_same(model, weights)


def test_head_of_another_class_count_starts_anew(tmp_path, caplog):
    weights = small(7, seed=1).state_dict()
    torch.save({"model": weights}, tmp_path / "w.pth")
    model = small(5)
    own = {name: value.clone() for name, value in model.state_dict().items() if "head" in name}
    with caplog.at_level("INFO"):
        start(model, finetune=str(tmp_path / "w.pth"))
    assert_same(model, weights | own)
    assert "a new head: 7 classes in the file, 5 here" in caplog.text


def test_22k_head_becomes_a_1k_head(tmp_path):
    index = imagenet1k_in_22k()
    assert len(set(index)) == 1000
    weights = small(max(index) + 1, seed=1).state_dict()
    # every row tells its number
    weights["head.bias"] = torch.arange(len(weights["head.bias"])).float()
    torch.save({"model": weights}, tmp_path / "w.pth")
    model = small(1000)
    start(model, finetune=str(tmp_path / "w.pth"))
    assert model.head.bias.tolist() == [float(row) for row in index]
    torch.testing.assert_close(model.head.weight[999], weights["head.weight"][index[999]])


def test_filters_are_resized(tmp_path):
    weights = small(seed=1).state_dict()
    torch.save({"model": weights}, tmp_path / "w.pth")
    model = small(global_filters=(None, None, (24, 13), (12, 7)))
    start(model, finetune=str(tmp_path / "w.pth"))
    name = "stages.2.0.gnconv.dwconv.complex_weight"
    fitted = model.state_dict()[name]
    assert fitted.shape[1:3] == (24, 13)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):  # align_corners keeps them
        torch.testing.assert_close(fitted[:, row, column], weights[name][:, row, column])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "norm.bias"}, "lacks norm.bias"),
        (lambda w: w | {"extra": torch.ones(1)}, "has unknown extra"),
        (lambda w: w | {"norm.bias": torch.ones(3)}, r"another shape of norm.bias \(\[3\]"),
        (lambda w: {"model": 3}, "no weights"),
        (lambda w: {"model": {"a.b": torch.ones(1)}}, "is of another model"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, change, message):
    torch.save(change(small(seed=1).state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        start(small(), finetune=str(tmp_path / "w.pth"))


def test_detector_gives_its_backbone(tmp_path, caplog):
    saved = small(seed=1).state_dict()
    own = {f"backbone.{k}": v for k, v in saved.items() if not k.startswith(("norm.", "head."))}
    rest = {"backbone.norm0.weight": torch.ones(16), "neck.lateral.weight": torch.ones(1)}
    torch.save({"state_dict": own | rest, "meta": {}}, tmp_path / "detector.pth")
    model = small()
    fresh = {
        k: v.clone() for k, v in model.state_dict().items() if k.startswith(("norm.", "head."))
    }
    with caplog.at_level("INFO"):
        start(model, finetune=str(tmp_path / "detector.pth"))
    assert_same(model, saved | fresh)
    assert "norm and head are new" in caplog.text


def test_whole_classifier_as_a_backbone_starts_nothing_anew(tmp_path, caplog):
    torch.save({f"backbone.{k}": v for k, v in small().state_dict().items()}, tmp_path / "w.pth")
    with caplog.at_level("INFO"):
        start(small(), finetune=str(tmp_path / "w.pth"))
    assert "start weights from" in caplog.text
    assert "new" not in caplog.text


def test_unnamed_classes_keep_the_head(tmp_path):
    saved = small(3, seed=1).state_dict()
    torch.save({"model": saved, "classes": ["ant", "bee", "cow"]}, tmp_path / "w.pth")
    model = small(3)
    start(model, ["0", "1", "2"], named=False, finetune=str(tmp_path / "w.pth"))
    assert_same(model, saved)


def test_folders_that_are_numbers_match_the_numbered_rows_of_a_file_without_names(tmp_path):
    saved = small(12, seed=1).state_dict()
    torch.save({"model": saved}, tmp_path / "w.pth")
    names = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...
    model = small(12)
    start(model, names, finetune=str(tmp_path / "w.pth"))
    for row, name in enumerate(names):
        assert torch.equal(model.head.weight[row], saved["head.weight"][int(name)])
    # the release's image_folder sorted folders as text, and saved no names
    torch.save({"model": saved, "args": {"data_set": "image_folder"}}, tmp_path / "w.pth")
    as_text = small(12)
    start(as_text, names, finetune=str(tmp_path / "w.pth"))
    assert torch.equal(as_text.head.weight, saved["head.weight"])
    # names that are numbers are names, too
    flags = {"data_set": "image_folder"}
    torch.save(
        {"model": saved, "classes": [*map(str, range(12))], "args": flags}, tmp_path / "w.pth"
    )
    other = small(12)
    start(other, names, finetune=str(tmp_path / "w.pth"))
    assert torch.equal(other.head.weight, model.head.weight)


def test_large_head_that_is_not_of_imagenet22k(tmp_path):
    saved = small(1500, seed=1)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = small(1000)
    fresh = model.head.weight.clone()
    start(model, finetune=str(tmp_path / "w.pth"))
    torch.testing.assert_close(model.head.weight, fresh)


@pytest.mark.parametrize("content", [lambda w: w, lambda w: {"model": w, "model_ema": w}])
def test_key_that_is_not_there(tmp_path, content):
    torch.save(content(small().state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match="no weights under --model_key net"):
        start(small(), finetune=str(tmp_path / "w.pth"), model_key="net")


def test_head_follows_the_names_of_the_classes(tmp_path, caplog):
    saved = small(3, seed=1)
    state = {"model": saved.state_dict(), "classes": ["ant", "bee", "cow"]}
    torch.save(state, tmp_path / "w.pth")
    options = {"finetune": str(tmp_path / "w.pth")}
    model = small(3)
    start(model, ["ant", "bee", "cow"], **options)
    assert_same(model, state["model"])
    start(model, ["cow", "ant", "bee"], **options)
    torch.testing.assert_close(model.head.weight, saved.head.weight[[2, 0, 1]])
    torch.testing.assert_close(model.head.bias, saved.head.bias[[2, 0, 1]])
    model, fresh = small(3), small(3).head.weight
    with caplog.at_level("INFO"):
        start(model, ["ant", "bee", "dog"], **options)
    torch.testing.assert_close(model.head.weight, fresh)
    assert "a new head: the file has other classes (ant, ...)" in caplog.text


def test_prefix_that_no_name_has(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="no name begins with --model_prefix net."):
        start(small(), finetune=str(tmp_path / "w.pth"), model_prefix="net.")


def test_prefix_that_the_model_has_itself_stays():
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(1, 1)})
    assert (
        models.checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    )


def test_damaged_safetensors_are_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(UserError, match="cannot be read"):
        load_start_weights(
            small(), FinetuneConfig(finetune=str(tmp_path / "w.safetensors")), 5, CPU
        )


def test_index_travels_with_the_package():
    recorded = json.loads((Path(models.__file__).parent / "imagenet1k_in_22k.json").read_text())
    assert recorded == imagenet1k_in_22k()


def test_name_that_is_neither_a_file_nor_published():
    with pytest.raises(UserError, match="neither a file nor.*hornet_tiny_gf.in1k"):
        start(small(), finetune="hornet_tiny_gf.in22k")
    with pytest.raises(UserError, match="no/such.pth does not exist"):
        start(small(), finetune="no/such.pth")


def test_head_of_another_model_of_timm(tmp_path):
    """timm's ConvNeXt has its head elsewhere: head.fc."""
    name, sizes = "convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    saved = timm.create_model(name, num_classes=7, **sizes).state_dict()
    torch.save(saved, tmp_path / "w.pth")
    model = timm.create_model(name, num_classes=5, **sizes)
    own = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("head.fc")}
    start(model, finetune=str(tmp_path / "w.pth"))
    assert_same(model, saved | own)

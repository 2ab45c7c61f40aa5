"""The page of examples/web in Chromium, with onnxruntime-web from npm."""

import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageCms

from config.flags import DataConfig
from inference.classifier import load_classifier
from inference.preprocessing import Preprocessing
from input_pipeline.transforms import mean_std
from tests.clients.conftest import PLACE, SIDE
from tests.drawings import CLASSES, write_drawings
from tools.export import main

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "examples/web"


@pytest.fixture
def site(tmp_path):
    """(folder, address) of the page, from a server of files and nothing more."""
    modules = PLACE / "web/node_modules"
    if not modules.is_dir():
        pytest.skip(f"no onnxruntime-web: npm install has not made {modules}")
    folder = tmp_path / "site"
    folder.mkdir()
    for file in ("index.html", "classifier.mjs"):  # the model, if any, is its user's
        shutil.copy(PAGE / file, folder)
    (folder / "node_modules").symlink_to(modules)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def tab(browser, site):
    """The page; other addresses than its own are refused."""
    tab = browser.new_page()
    own = site[1]
    tab.route("**", lambda r: r.continue_() if r.request.url.startswith(own) else r.abort())
    yield tab
    tab.close()


@pytest.fixture(scope="module", params=["hornet_atto_7x7", "hornet_atto_gf"])
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    network = timm.create_model(request.param, num_classes=3, layer_scale_init_value=0.5)
    with torch.no_grad():
        network.head.weight.mul_(20)
    flags = {"model": request.param, "input_size": SIDE, "crop_pct": 0.875}
    path = tmp_path_factory.mktemp("weights") / "a.pth"
    classes = [*CLASSES[:2], "<b>third</b>"]
    torch.save({"model": network.state_dict(), "args": flags, "classes": classes}, path)
    return path


def shown(tab):
    rows = tab.locator("#answer .row")
    rows.first.wait_for(timeout=30_000)
    texts = [row.locator("span").all_inner_texts() for row in rows.all()]
    return [(name, float(share.removesuffix(" %")) / 100) for name, share in texts]


def test_an_image_of_several_classes(tab, site, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["args"] |= {"data_set": "multi_label", "input_size": [48, 80]}
    torch.save(saved, tmp_path / "several.pth")
    arguments = ["--checkpoint", str(tmp_path / "several.pth"), "--target", "web"]
    assert main([*arguments, "--output", str(site[0] / "model.onnx")]) == 0
    photo = tmp_path / "photo.png"
    Image.new("RGB", (90, 70), "orange").save(photo)
    classifier = load_classifier(str(tmp_path / "several.pth"))
    with torch.no_grad():
        shares = classifier.model(classifier.inputs([photo])).sigmoid()[0].tolist()
    tab.goto(site[1])
    tab.get_by_role("status").filter(has_text="3 classes, 48 x 80 pixels").wait_for(timeout=30_000)
    tab.set_input_files("#image", photo)
    wanted = dict(zip(classifier.classes, shares, strict=True))
    assert dict(shown(tab)) == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_answer_is_that_of_pytorch(tab, site, checkpoint, tmp_path, dtype):
    folder, address = site
    write_drawings(tmp_path / "images", 4)
    more = ["--calibration", str(tmp_path / "images")] if dtype == "int8" else []
    arguments = ["--checkpoint", str(checkpoint), "--target", "web", "--dtype", dtype, *more]
    assert main([*arguments, "--output", str(folder / "model.onnx")]) == 0
    photo = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    Image.fromarray(noise).resize((211, 150), Image.Resampling.BICUBIC).save(photo)
    classifier = load_classifier(str(checkpoint))
    with torch.no_grad():
        shares = classifier.model(classifier.inputs([photo])).softmax(1)[0].tolist()
    wanted = sorted(zip(classifier.classes, shares, strict=True), key=lambda pair: -pair[1])
    tab.goto(address)
    tab.get_by_role("status").filter(has_text="3 classes").wait_for(timeout=30_000)
    tab.set_input_files("#image", photo)
    found = shown(tab)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    tolerance = 0.05 if dtype == "int8" else 0.005
    assert [s for _, s in found] == pytest.approx([s for _, s in wanted], abs=tolerance)
    assert re.match(r"photo.png: \d+ ms", tab.get_by_role("status").inner_text())


def profile():
    """A colour profile that swaps red and blue."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * data[131], 12)}
    red, blue = (slice(tags[tag] + 4, tags[tag] + 12) for tag in (b"rXYZ", b"bXYZ"))
    data[red], data[blue] = data[blue], data[red]
    return bytes(data)


IMAGES = {
    "wide": ((211, 150), "RGB", {}),
    "tall": ((150, 211), "RGB", {}),
    "small": ((40, 31), "RGB", {}),
    "alpha": ((211, 150), "RGBA", {}),
    "grey": ((211, 150), "L", {}),
    "turned": ((211, 150), "RGB", {"exif": True}),
    "profile": ((211, 150), "RGB", {"icc_profile": profile()}),
}


@pytest.mark.parametrize(
    ("size", "crop_pct"), [(32, None), (SIDE, 0.875), ((48, 80), 0.875), ((90, 40), 0.8)]
)
def test_images_are_prepared_as_by_pillow(tab, site, tmp_path, size, crop_pct):
    """To one of 255 steps in a few places."""
    view = Preprocessing(size, *mean_std(DataConfig()), crop_pct)
    facts = {"input_size": view.input_size, "mean": view.mean, "std": view.std,
             "crop_pct": view.crop_pct, "background": "white"}  # fmt: skip
    tab.goto(site[1])
    for name, (shape, mode, options) in IMAGES.items():
        noise = np.random.default_rng(0).integers(0, 256, (12, 17, 4), np.uint8)
        image = Image.fromarray(noise).resize(shape, Image.Resampling.BICUBIC).convert(mode)
        if options.get("exif"):
            options = {"exif": Image.Exif()}
            options["exif"][0x0112] = 6
        file = tmp_path / f"{name}.png"
        image.save(file, **options)
        pixels = tab.evaluate(
            """async ([bytes, facts]) => {
                const { preprocess } = await import("./classifier.mjs");
                return Array.from(await preprocess(new Blob([new Uint8Array(bytes)]), facts));
            }""",
            [list(file.read_bytes()), facts],
        )
        distance = (torch.tensor(pixels) - view.transform(view.load(file)).flatten()).abs()
        assert distance.max() < 1.01 / 255 / 0.224, name
        assert (distance > 1e-5).float().mean() < 0.02, name


def test_mistakes_on_the_page(tab, site, tmp_path):
    status = tab.get_by_role("status")
    tab.goto(site[1])
    status.filter(has_text="model.onnx: there is no such file beside this page").wait_for()
    (tmp_path / "a.png").write_bytes(b"no image")
    tab.set_input_files("#image", tmp_path / "a.png")
    status.filter(has_text="there is no model yet").wait_for()
    for content in (b"nothing of use", b"", bytes(1000)):
        (tmp_path / "a.onnx").write_bytes(content)
        tab.set_input_files("#model", tmp_path / "a.onnx")
        status.filter(has_text=re.compile("a.onnx: this is (not|damaged)")).wait_for()
        tab.set_input_files("#model", [])
    file = tmp_path / "b.onnx"
    arguments = ["hornet_atto_7x7", "--target", "web", "--input-size", str(SIDE)]
    assert main([*arguments, "--output", str(file)]) == 0
    tab.set_input_files("#model", file)
    status.filter(has_text="b.onnx: hornet_atto_7x7, 1000 classes, 64 x 64 pixels").wait_for()
    tab.set_input_files("#image", [])
    tab.set_input_files("#image", tmp_path / "a.png")
    status.filter(has_text="a.png: the browser cannot read this image").wait_for()
    # an image that is let go of over the page
    Image.new("RGB", (70, 90), "red").save(tmp_path / "red.png")
    data = tab.evaluate_handle(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "red.png", {type: "image/png"}));
            return data;
        }""",
        list((tmp_path / "red.png").read_bytes()),
    )
    tab.locator("#drop").dispatch_event("drop", {"dataTransfer": data})
    assert len(shown(tab)) == 5
    assert tab.locator("#picture").is_visible()
    tab.set_input_files("#image", [])
    tab.set_input_files("#image", tmp_path / "a.png")
    status.filter(has_text="a.png: the browser cannot read this image").wait_for()
    assert not tab.locator("#picture").is_visible()
    assert tab.locator("#answer .row").count() == 0


def test_the_page_without_its_packages(tab, site):
    (site[0] / "node_modules").unlink()
    (site[0] / "model.onnx").write_bytes(b"")
    tab.goto(site[1])
    text = "model.onnx: onnxruntime-web is missing: npm install --prefix examples/web"
    tab.get_by_role("status").filter(has_text=text).wait_for()

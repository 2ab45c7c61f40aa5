"""Images of other shapes, channels and pixels than squares of 8-bit RGB."""

import json
import tarfile

import numpy as np
import pytest
import tifffile
import timm.data
import torch
from PIL import Image, ImageOps

import models  # noqa: F401 - registers the HorNets
from checkpoints.fitting import load_start_weights
from config.command_line import parse_args
from datasets import build_data
from inference.classifier import load_classifier
from inference.convert import convert
from inference.export import export
from inference.exported import Exported
from inference.prediction import predictions
from inference.targets import Options
from input_pipeline.images import Decoding, load_image
from input_pipeline.transforms import eval_transform, train_transform
from main import run
from runtime.distributed import SINGLE_PROCESS
from runtime.errors import UserError
from runtime.logging import read_log
from tools import predict, visualize
from tools.export import main as export_main

FLAGS = [
    *("--data_set", "image_folder", "--model", "hornet_atto_gf", "--device", "cpu"),
    *("--model_kwargs", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--num_workers", "0"),
    *("--batch_size", "16", "--lr", "3e-3", "--layer_scale_init_value", "1", "--epochs", "2"),
    *("--warmup_epochs", "0", "--mixup", "0", "--cutmix", "0", "--color_jitter", "0"),
    *("--aa", "none", "--reprob", "0"),
]


def config_of(*flags):
    return parse_args([str(flag) for flag in (*FLAGS, *flags)])


def write_spectra(folder, channels=5, images=96):
    """Float TIFFs from -1 to 3, whose class is the channel with a bright square."""
    random = np.random.default_rng(0)
    for part, count in (("train", images), ("val", images // 2)):
        for index in range(count):
            label = index % 2
            pixels = random.uniform(-1, 0, (40, 56, channels)).astype(np.float32)
            pixels[8:30, 10:40, 1 + label] += 2.5
            file = folder / part / "ab"[label] / f"{index}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of images of five channels, and a run with images of 48 x 64 of them."""
    folder, output = tmp_path_factory.mktemp("spectra"), tmp_path_factory.mktemp("run")
    write_spectra(folder)
    flags = ["--input_size", "48", "64", "--in_chans", "5", "--value_range", "-1", "3"]
    run(config_of("--data_path", folder, "--output_dir", output, *flags, "--epochs", "6"))
    return folder, output


def test_a_run_learns_channels(trained):
    assert read_log(trained[1])[-1]["test_acc1"] == 100


def test_the_tools_take_the_same_images(trained, tmp_path, capsys):
    folder, output = trained
    checkpoint = str(output / "checkpoint-5.pth")
    classifier = load_classifier(checkpoint)
    assert classifier.preprocessing.input_size == (48, 64)
    files = sorted((folder / "val").rglob("*.tif"))
    assert classifier.inputs(files).shape == (len(files), 5, 48, 64)
    found = [*predictions(classifier, files, torch.device("cpu"), 1, 8)]
    assert [one.classes[0][0] for one in found] == [file.parent.name for file in files]
    predict.main([str(files[0]), "--checkpoint", checkpoint, "--show-dir", str(tmp_path / "shown")])
    assert len(list((tmp_path / "shown").iterdir())) == 1
    cam = ["cam", str(folder / "val"), "--checkpoint", checkpoint]
    visualize.main([*cam, "--output", str(tmp_path / "cam.png")])
    assert (tmp_path / "cam.png").is_file()
    export(classifier, tmp_path / "m.onnx", Options())
    facts = Exported(tmp_path / "m.onnx").facts
    assert (facts.input_size, facts.channels, facts.value_range) == ([48, 64], 5, [-1, 3])
    convert(checkpoint, tmp_path / "folder")
    convert(checkpoint, tmp_path / "m.safetensors")
    for other in ("m.onnx", "folder", "m.safetensors"):
        again = predictions(
            load_classifier(str(tmp_path / other)), files, torch.device("cpu"), 1, 8
        )
        for one, other_one in zip(found, again, strict=True):
            assert dict(other_one.classes) == pytest.approx(dict(one.classes), abs=1e-5)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [5, 48, 64]
    assert config["model_args"]["in_chans"] == 5
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "48 x 64 pixels, 5 channels; values from -1 to 3 become 0 to 1" in card
    assert "float32 (1, 5, 48, 64)" in card
    web = ["--checkpoint", checkpoint, "--target", "web", "--output", str(tmp_path / "w.onnx")]
    assert export_main(web) == 1
    assert "--target web: browsers read 8-bit colours only" in capsys.readouterr().err


def test_evaluation_and_views_of_a_rectangle(trained, capsys):
    folder, output = trained
    flags = ["--input_size", "48", "64", "--in_chans", "5", "--value_range", "-1", "3"]
    flags += ["--eval", "true", "--resume", output / "checkpoint-5.pth", "--data_path", folder]
    run(config_of(*flags))
    run(config_of(*flags, "--tta", "flip", "crops", "scales"))
    assert capsys.readouterr().out.count("top-1 100.00%") == 2


@pytest.mark.parametrize("size", [(48, 64), (96, 40), (64, 64)])
def test_evaluation_is_that_of_timm(size):
    pixels = np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    image, mean = Image.fromarray(pixels), (0.5,) * 3
    peer = timm.data.create_transform(
        (3, *size), interpolation="bicubic", mean=mean, std=mean, crop_pct=0.875
    )
    found = eval_transform(size, mean, mean)(image)
    assert found.shape == (3, *size)
    torch.testing.assert_close(found, peer(image), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(48, 64), (24, 32), (64, 64)])
def test_arrays_of_rgb_give_nearly_the_images_of_pillow(size):
    """Except that Pillow rounds to 8 bits, once after each direction of the resizing."""
    # so that no pass overshoots, which Pillow clips
    pixels = np.random.default_rng(0).integers(90, 160, (120, 90, 3), dtype=np.uint8)
    mean = (0.5,) * 3
    expected = eval_transform(size, mean, mean)(Image.fromarray(pixels))
    array = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    found = eval_transform(size, mean, mean, as_array=True)(array)
    assert (found - expected).abs().max() < 2.5 * 2 / 255
    augment = config_of().augment
    trained = train_transform(augment, size, mean, mean, as_array=True)(array)
    assert trained.shape == (3, *size)
    assert trained.min() >= -1
    assert trained.max() <= 1


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", ["contig", "planes", "pages", "grey"])
def test_tiffs_of_all_layouts(tmp_path, kind, layout):
    channels = 1 if layout == "grey" else 4
    random = np.random.default_rng(0)
    pixels = random.integers(0, 200, (6, 9, channels)).astype(kind)
    path, planes = tmp_path / "image.tif", pixels.transpose(2, 0, 1)
    if layout == "grey":
        tifffile.imwrite(path, pixels[..., 0])
    elif layout == "contig":
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    elif layout == "planes":
        tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate")
    else:
        tifffile.imwrite(path, planes, photometric="minisblack")
    span = (0.0, 200.0) if kind == "float32" else None
    most = {"uint8": 255, "uint16": 65535, "float32": 200}[kind]
    found = load_image(str(path), Decoding(channels=channels, value_range=span or (0, most)))
    torch.testing.assert_close(found, torch.from_numpy(planes.astype(np.float32) / most))
    if channels == 4 and not span:
        again = load_image(str(path), Decoding(channels=4))
        torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_tiffs_in_tar_files(tmp_path):
    write_spectra(tmp_path / "a", images=4)
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            tar.add(tmp_path / "a" / part, part)
    flags = ["--data_set", "tar", "--data_path", tmp_path, "--in_chans", "5"]
    config = config_of(*flags, "--value_range", "-1", "3", "--input_size", "48", "64")
    images = build_data(config.data, config.augment, config.model.input_size, saved=None).val
    file = tmp_path / "a/val/a/0.tif"
    image, label = images[0]
    expected = load_image(str(file), Decoding(channels=5, value_range=(-1, 3)))
    mean = (0.5,) * 5
    view = eval_transform((48, 64), mean, mean, as_array=True)
    torch.testing.assert_close(view.finish(image[None])[0], view(expected))
    assert label == 0
    assert images.blank().shape == (5, 48, 64)


def test_files_of_pillow(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65535, (5, 7), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = load_image(str(tmp_path / "grey.png"), Decoding(channels=1))
    torch.testing.assert_close(found[0], torch.from_numpy(grey / np.float32(65535)))
    colours = np.random.default_rng(0).integers(0, 255, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    found = load_image(str(tmp_path / "rgba.png"), Decoding(channels=4))
    torch.testing.assert_close(found, torch.from_numpy(colours).permute(2, 0, 1) / 255)
    Image.fromarray(colours[..., :3]).save(tmp_path / "rgb.png")
    found = load_image(str(tmp_path / "rgb.png"), Decoding(channels=1))
    expected = np.array(Image.fromarray(colours[..., :3]).convert("L"))
    torch.testing.assert_close(found[0], torch.from_numpy(expected) / 255)
    found = load_image(str(tmp_path / "grey.png"), Decoding(value_range=(0, 65535)))
    assert found.shape == (3, 5, 7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_exif_orientation(tmp_path, orientation, suffix):
    pixels = np.arange(35, dtype=np.uint8).reshape(5, 7)
    path = tmp_path / f"image.{suffix}"
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    image.save(path, exif=image.getexif())
    expected = np.asarray(ImageOps.exif_transpose(image))
    found = load_image(str(path), Decoding(channels=1, value_range=(0, 255)))
    torch.testing.assert_close(found[0], torch.from_numpy(expected.copy()) / 255)


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.zeros((4, 4), np.float32), {}, "give --value_range LOW HIGH"),
        (np.zeros((4, 4), np.int16), {}, "pixels are int16 of an unknown range"),
        (np.full((4, 4), np.nan, np.float32), {"value_range": (0, 1)}, "not finite"),
        (np.zeros((2, 4, 4), np.uint8), {}, "it has 2 channels, --in_chans is 1"),
        (np.zeros((3, 2, 4, 4), np.uint8), {}, "more than one of channels"),
    ],
)
def test_unfit_images_are_one_line(tmp_path, pixels, options, message):
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="minisblack")
    with pytest.raises(UserError, match=message) as error:
        load_image(str(tmp_path / "image.tif"), Decoding(channels=1, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "P", "L", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiffs_of_8_bits_are_read_as_other_formats(tmp_path, mode, channels):
    colours = np.random.default_rng(0).integers(0, 255, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(colours).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
    found = []
    for suffix in ("png", "tif"):
        image.save(tmp_path / f"a.{suffix}")
        decoding = Decoding(channels=channels, value_range=(0, 255))
        found.append(load_image(str(tmp_path / f"a.{suffix}"), decoding))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_dark_on_white_tiffs_are_turned_over(tmp_path):
    pixels = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    found = load_image(str(tmp_path / "a.tif"), Decoding(channels=1))
    torch.testing.assert_close(found[0], 1 - torch.from_numpy(pixels / np.float32(65535)))


def test_files_whose_values_are_lost_are_refused(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095 " + bytes([0, 60, 0, 120]))
    with pytest.raises(UserError, match="PPM files do not keep their values"):
        load_image(str(tmp_path / "a.pgm"), Decoding(channels=1, value_range=(0, 4095)))
    pixels = np.zeros((4, 4, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="cielab")
    with pytest.raises(UserError, match="its pixels are CIELAB: save it as RGB"):
        load_image(str(tmp_path / "a.tif"), Decoding(value_range=(0, 255)))


def test_colours_of_16_bits_in_png_are_refused(tmp_path):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "image.png"), np.full((4, 4, 4), 999, np.uint16))
    with pytest.raises(UserError, match="only 8 would be read: save it as TIFF"):
        load_image(str(tmp_path / "image.png"), Decoding(channels=4))


def test_start_weights_for_other_channels_are_those_of_timm(tmp_path):
    whole = timm.create_model("hornet_atto_7x7", num_classes=4)
    torch.save({"model": whole.state_dict()}, tmp_path / "rgb.pth")
    for channels in (1, 5):
        config = config_of("--finetune", tmp_path / "rgb.pth", "--in_chans", channels)
        model = timm.create_model("hornet_atto_7x7", num_classes=4, in_chans=channels)
        load_start_weights(model, config.finetune, list("abcd"), SINGLE_PROCESS)
        first = model.state_dict()["downsample_layers.0.0.weight"]
        given = whole.state_dict()["downsample_layers.0.0.weight"]
        expected = timm.models.adapt_input_conv(channels, given)
        torch.testing.assert_close(first, expected, rtol=0, atol=0)
    # a grey image gives the same maps as its three equal channels
    grey = timm.create_model("hornet_atto_7x7", num_classes=4, in_chans=1)
    config = config_of("--finetune", tmp_path / "rgb.pth", "--in_chans", 1)
    load_start_weights(grey, config.finetune, list("abcd"), SINGLE_PROCESS)
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey.eval()(image), whole.eval()(image.expand(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("span", "message"),
    [((-3, -1), "of the pixels of some images are at its upper end"),
     ((-1, 90), "no pixel of some images is above"), ((-1, 3), "")],
)  # fmt: skip
def test_a_range_that_does_not_fit_is_told(trained, span, message, capsys):
    flags = ["--input_size", "48", "64", "--in_chans", "5", "--value_range", *span]
    flags += ["--eval", "true", "--resume", trained[1] / "checkpoint-5.pth"]
    run(config_of(*flags, "--data_path", trained[0]))
    told = capsys.readouterr().out
    assert message in told
    assert ("pixel" in told) == bool(message)


def test_float_tiffs_are_told_how_to_be_read(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb")
    with pytest.raises(UserError, match="give --in_chans or --value_range LOW HIGH"):
        load_image(str(tmp_path / "a.tif"))


def test_a_teacher_takes_the_same_pixels(trained, tmp_path):
    folder, output = trained
    flags = ["--data_path", folder, "--teacher", output / "checkpoint-5.pth"]
    with pytest.raises(UserError, match="takes images of 5 channels, not of --in_chans 3"):
        run(config_of(*flags, "--value_range", "-1", "3"))
    with pytest.raises(UserError, match="was trained with --value_range"):
        run(config_of(*flags, "--in_chans", "5", "--value_range", "0", "3"))


def test_the_channels_of_a_checkpoint_are_told(trained):
    flags = ["--eval", "true", "--resume", trained[1] / "checkpoint-5.pth"]
    with pytest.raises(UserError, match="--in_chans is 3, .* was trained with 5"):
        run(config_of("--data_path", trained[0], *flags))


def test_weights_for_some_channels_fit_no_others(tmp_path):
    four = timm.create_model("hornet_atto_7x7", num_classes=4, in_chans=4)
    torch.save({"model": four.state_dict()}, tmp_path / "four.pth")
    for channels in (1, 3, 5):
        config = config_of("--finetune", tmp_path / "four.pth", "--in_chans", channels)
        model = timm.create_model("hornet_atto_7x7", num_classes=4, in_chans=channels)
        with pytest.raises(UserError, match=r"\[32, 4, 4, 4\] instead of"):
            load_start_weights(model, config.finetune, list("abcd"), SINGLE_PROCESS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in_chans", "4", "--aa", "rand-m9"], "give --aa none --color_jitter 0"),
        (["--in_chans", "4", "--color_jitter", "0.4"], "give --aa none --color_jitter 0"),
        (["--in_chans", "4", "--data_set", "CIFAR"], "--data_set CIFAR has 8-bit RGB images"),
        (["--value_range", "3", "3"], "give the smaller number first"),
        (["--mean", "0.5"], "--mean and --std go together"),
        (["--mean", "0.5", "0.5", "--std", "1"], "2 numbers for --in_chans 3"),
        (["--mean", "0.5", "--std", "0"], "has to be above 0"),
        (["--mean", "127", "--std", "60"], "--mean .* has to be from 0 to 1"),
        (["--in_chans", "4", "--fast_decode", "true"], "--fast_decode true is for 8-bit RGB"),
        (["--in_chans", "4", "--train_interpolation", "random"], "bicubic, bilinear or nearest"),
        (["--input_size", "48", "64", "--size_schedule", "32@0"], "sizes are of squares"),
        (["--input_size", "1", "2", "3"], "--input_size .*expected a number, or two"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        config_of(*flags)


def test_mean_and_deviation_of_the_flags(trained):
    config = config_of("--mean", "0.1", "--std", "0.2", "0.3", "0.4").data
    view = load_classifier(str(trained[1] / "checkpoint-5.pth")).preprocessing
    assert (view.mean, view.std) == ((0.5,) * 5, (0.5,) * 5)
    from input_pipeline.transforms import mean_std

    assert mean_std(config) == ((0.1, 0.1, 0.1), (0.2, 0.3, 0.4))

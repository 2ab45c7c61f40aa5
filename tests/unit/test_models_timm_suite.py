"""timm's own model tests, from its source distribution, on this project's models."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401 - registers the models

ROOT = Path(__file__).parents[2]
SELECTION = "hornet_atto or hornet_tiny and pretrained"  # atto has no published weights


@pytest.fixture(scope="module")
def test_file(tmp_path_factory) -> Path:
    """tests/test_models.py of the installed version of timm, alone in a folder."""
    folder = tmp_path_factory.mktemp("timm")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm"]
    command += ["--dest", str(folder), f"timm=={timm.__version__}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("timm-*.tar.gz"))
    if not archives and os.environ.get("CI"):
        pytest.fail(f"timm's source distribution can't be had: {run.stderr.strip()[-200:]}")
    if not archives:
        pytest.skip(f"timm's source distribution can't be had: {run.stderr.strip()[-200:]}")
    path = folder / "test_models.py"
    with tarfile.open(archives[0]) as archive:
        name = next(n for n in archive.getnames() if n.endswith("/tests/test_models.py"))
        member = archive.extractfile(name)
        assert member is not None
        path.write_bytes(member.read())
    (folder / "pytest.ini").write_text("[pytest]\n")
    return path


def write_cache(home):
    """torch's cache with what the tests of pretrained weights would download, of random values."""
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in timm.list_pretrained("hornet_tiny_*"):
        torch.save({"model": timm.create_model(name).state_dict()}, folder / f"{name}.pth")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_timm_suite(test_file, tmp_path):
    write_cache(tmp_path)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.timm_plugin", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "-c", "pytest.ini", test_file.name, "-k", SELECTION]
    run = subprocess.run(
        command,
        cwd=test_file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    # among the tests only if the plugin has added the models' module to FEAT_INTER_FILTERS
    assert "test_model_forward_intermediates[1-hornet_atto_gf] PASSED" in run.stdout
    assert "test_model_load_pretrained[1-hornet_tiny_gf.in1k] PASSED" in run.stdout

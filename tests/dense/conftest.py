"""What needs the mm stack (`make dense`); without it there is nothing here to test."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("mmdet") and find_spec("mmseg") else ["test_*.py"]


@pytest.fixture(autouse=True)
def scope():
    """Registries look things up in the scope of the last config that was used: each test anew."""
    yield
    if find_spec("mmengine"):
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/dense/" in item.path.as_posix():
            item.add_marker(pytest.mark.dense)

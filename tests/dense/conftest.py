"""What needs the mm stack (`make dense`); without it there is nothing here to test."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("mmdet") and find_spec("mmseg") else ["test_*.py"]


def forget_runs():
    """Forget the scope of the last config, in which registries look things up, and visualizers.

    Hooks draw by the newest visualizer of the process.
    """
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer

    for managed in (DefaultScope, Visualizer, *Visualizer.__subclasses__()):
        managed._instance_dict.clear()


@pytest.fixture(autouse=True)
def nothing_of_other_runs():
    yield
    forget_runs()


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/dense/" in item.path.as_posix():
            item.add_marker(pytest.mark.dense)

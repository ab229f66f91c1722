"""These run in an environment of their own, by ``make test-tpu-xla``, with programs executed on the host."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

IS_HERE = find_spec("torch_xla") is not None
if IS_HERE:
    os.environ["PJRT_DEVICE"] = "CPU"


def pytest_collection_modifyitems(items):
    """Without torch_xla there is nothing to test. With it, torch was built for GPUs, and warns that there are none."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skipif(not IS_HERE, reason="needs torch_xla: make test-tpu-xla"))
            item.add_marker(pytest.mark.filterwarnings("ignore:CUDA initialization"))


@pytest.fixture
def bridge():
    """Opened for the process."""
    from dovetail_tpu.bridges import open_bridge

    return open_bridge("torch_xla")

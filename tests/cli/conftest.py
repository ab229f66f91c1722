import sys

import pytest
import torch

from dovetail.testing.fake_plugins import install

PLUGIN = """
from dovetail import hookimpl
from dovetail.plugins.manifest import PlatformManifest

@hookimpl
def dovetail_register_platforms(register):
    manifest = PlatformManifest(
        name="plain", summary="Reference operations.", device_type="cpu", dtypes=("float32",), attention=("reference",)
    )
    register(manifest, "dovetail.testing.platforms:ReferencePlatform")
"""


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Options that run the demo model on a platform of reference operations, brought by a made-up plugin."""
    monkeypatch.syspath_prepend(tmp_path)
    module = install(tmp_path, "plain", PLUGIN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    yield ["--platform", "plain", "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    torch.set_num_threads(threads)
    sys.modules.pop(module, None)

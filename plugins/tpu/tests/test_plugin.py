"""What the plugin registers, and that nothing is opened to find out what is there."""

import json
import os
import subprocess
import sys

import pytest

from dovetail.contracts.platform import PlatformConfig
from dovetail.errors import ConfigError
from dovetail.plugins.host import PluginHost
from dovetail_tpu import bridges, detect
from dovetail_tpu.platform import TpuPlatform

PROBE = """
import json, sys
from dovetail.plugins.host import PluginHost
from dovetail_tpu.platform import TpuPlatform
registries = PluginHost().discover().registries
probe = TpuPlatform.probe()
heavy = [name for name in ("jax", "jaxlib", "torchax", "torch_xla", "libtpu") if name in sys.modules]
print(json.dumps([probe.available, probe.reason, heavy]))
"""


def probe_elsewhere(**environment):
    """Whether it is available, why not, and what was imported, in a process of its own."""
    for name in ("JAX_PLATFORMS", "PJRT_DEVICE"):
        environment.setdefault(name, "")
    run = subprocess.run([sys.executable, "-c", PROBE], env=os.environ | environment, capture_output=True, check=True)
    return json.loads(run.stdout)


def test_it_provides_a_platform_and_two_attention_backends():
    (status,) = [p for p in PluginHost().discover().plugins if p.name == "tpu"]
    assert (status.distribution, status.state, status.error) == ("dovetail-tpu", "loaded", None)
    assert {kind: sorted(names) for kind, names in status.provides.items()} == {
        "attention": ["tpu", "tpu-gather"],
        "commands": ["plan"],
        "platforms": ["tpu"],
    }


@pytest.mark.skipif(bool(detect.chips()), reason="has a TPU")
def test_without_a_chip_it_is_unavailable_and_says_what_to_do():
    available, reason, heavy = probe_elsewhere()
    assert not available
    assert "JAX_PLATFORMS=cpu" in reason
    assert not heavy


@pytest.mark.skipif(bool(detect.chips()), reason="has a TPU")
def test_the_host_executes_only_where_somebody_said_so():
    available, _, heavy = probe_elsewhere(JAX_PLATFORMS="cpu")
    assert available
    assert not heavy
    entries = PluginHost().discover().registries.platforms
    assert entries.get("tpu").manifest.priority < entries.get("cpu").manifest.priority


def test_facts_say_that_the_host_executes():
    assert "JAX_PLATFORMS" in TpuPlatform.probe().facts["chips"]


def test_chips_are_found_by_the_files_of_the_bus(tmp_path):
    for slot, (vendor, device) in enumerate(
        [("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x1af4", "0x1000"), ("0x1ae0", "0x1234")]
    ):
        folder = tmp_path / f"0000:00:0{slot}.0"
        folder.mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    assert detect.chips(tmp_path) == {"v5e": 2}
    assert not detect.chips(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"bridge": "abacus"}, "abacus"), ({"devices": "many"}, "many"), ({"devices": 4096}, "4096")],
    ids=str,
)
def test_options_that_cannot_be_honoured_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        TpuPlatform(PlatformConfig(options=options))


def test_a_bridge_whose_modules_are_missing_is_refused(monkeypatch):
    monkeypatch.setattr(bridges, "installed", list)
    with pytest.raises(ConfigError, match="torchax"):
        bridges.open_bridge("jax")


def test_attention_without_the_platform_is_refused(monkeypatch):
    monkeypatch.setattr(bridges, "_opened", [])
    with pytest.raises(ConfigError, match="--platform tpu"):
        bridges.current()

"""What a plugin module may cost: heavy libraries, slowness, hanging, and what is measured of it."""

import contextlib
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest

from dovetail.errors import PluginLoadError
from dovetail.plugins import light_import
from dovetail.plugins.host import PluginHost
from dovetail.plugins.light_import import HEAVY, HeavyImports, light_imports
from dovetail.testing.fake_plugins import install

HOOK = """
from dovetail import hookimpl
from dovetail.plugins.manifest import ModelManifest

@hookimpl
def dovetail_register_models(register):
    {body}
    register(ModelManifest(name="toy", summary="", architectures=()), "toys:Toy")
"""


def status(name):
    (found,) = [plugin for plugin in PluginHost().discover(warn=False).plugins if plugin.name == name]
    return found


def status_in_fresh_process(site, source, *, before=""):
    """In a process that has none of the heavy libraries."""
    install(site, "fat", source)
    code = f"""
        {before}
        import sys
        from dovetail.plugins.host import PluginHost
        (fat,) = [p for p in PluginHost().discover(warn=False).plugins if p.name == "fat"]
        print(fat.state, "numpy" in sys.modules, fat.error, fat.remedy)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {"PYTHONPATH": str(site)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    "source",
    [
        "import numpy",
        "import numpy.linalg",
        "try:\n    import numpy\nexcept ImportError:\n    numpy = None",
        "try:\n    import numpy\nexcept Exception:\n    numpy = None",
        HOOK.format(body="import numpy"),
    ],
)
def test_heavy_library_is_refused_before_it_costs_anything(site, source):
    said = status_in_fresh_process(site, source)
    assert said.startswith("quarantined False PluginLoadError: its plugin module imports numpy")
    assert "move the import into the module that a target names." in said


def test_heavy_library_that_is_loaded_already_is_fine(site):
    assert status_in_fresh_process(site, "import numpy", before="import numpy").startswith("loaded True")


def test_a_refusal_that_was_swallowed_is_repeated():
    swallowed = contextlib.suppress(PluginLoadError)
    with pytest.raises(PluginLoadError, match="imports tensorflow"), light_imports(), swallowed:
        import_module("tensorflow")  # not installed, so never loaded already
    assert not any(isinstance(finder, HeavyImports) for finder in sys.meta_path)


def test_other_threads_may_import_meanwhile():
    import threading

    found = []
    with light_imports():
        finder = sys.meta_path[0]
        thread = threading.Thread(target=lambda: found.append(finder.find_spec("numpy")))
        thread.start()
        thread.join()
    assert found == [None]
    assert finder not in sys.meta_path
    assert "numpy" in HEAVY


def test_slow_import_is_a_warning_with_seconds(site, monkeypatch):
    monkeypatch.setattr(light_import, "SLOW_SECONDS", 0.05)
    install(site, "slow", HOOK.format(body="import time; time.sleep(0.06)"))
    install(site, "quick", HOOK.format(body="").replace('"toy"', '"other"'))
    slow = status("slow")
    assert (slow.state, slow.well) == ("loaded", False)
    assert slow.warnings[0].startswith("slow: its import took 0.")
    assert slow.seconds > 0.05
    assert status("quick").warnings == ()


def test_hanging_import_says_who_and_where(site, monkeypatch, capsys):
    monkeypatch.setattr(light_import, "HANG_SECONDS", 0.05)
    install(site, "hung", "import time\ntime.sleep(0.3)")
    status("hung")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dovetail: plugin 'hung' (dist-hung 1.0) has been loading for 0 s, now at ")
    assert line.endswith(
        "fake_hung_dist_hung.py:2. If it hangs, leave it out with DOVETAIL_DISABLE_PLUGINS=hung."
    )

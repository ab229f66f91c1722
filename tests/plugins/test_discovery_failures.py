"""What can be wrong with a plugin before anything of it is used: each as an installed package.

Merely discovered, it is quarantined, and its neighbours work. Asked for, nothing starts. Either way the message names
plugin, distribution, version, cause and remedy.
"""

from __future__ import annotations

import dataclasses

import pytest

HEADER = """
from dovetail import hookimpl
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest, QuantManifest
"""
GOOD = (
    HEADER
    + """
import os, pathlib
if "PIDS" in os.environ:
    with pathlib.Path(os.environ["PIDS"]).open("a") as file:
        print(os.getpid(), file=file)

@hookimpl
def dovetail_register_attention_backends(register):
    manifest = AttentionManifest(name="neighbour", summary="", device_types=("cpu",), dtypes=("float32",))
    register(manifest, "dovetail.platforms.cpu.reference_attention:ReferenceAttention")
"""
)


def quant(name, **fields):
    extra = "".join(f", {field}={value!r}" for field, value in fields.items())
    return f"""
@hookimpl
def dovetail_register_quant_methods(register):
    register(QuantManifest(name={name!r}, summary=""{extra}), "json:loads")
"""


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to fail: the plugin module, and what is said of it."""

    source: str
    cause: str
    remedy: str
    requires: tuple[str, ...] = ()


REPAIR = "Install a release of dist-{name} that repairs this"
MODES = {
    "import-error": Mode(
        "import libnothing",
        "ModuleNotFoundError: No module named 'libnothing'.",
        "Install the distribution that brings module 'libnothing'; dist-{name} does not declare it",
    ),
    "missing-dependency": Mode(
        "import libquill",
        "ModuleNotFoundError: No module named 'libquill'.",
        "Install what dist-{name} depends on: pip install 'libquill>=2'.",
        ("libquill>=2",),
    ),
    "torn-installation": Mode(
        "import torn_installation.lost",
        "No module named 'torn_installation.lost'",
        "run: pip install --force-reinstall dist-{name}.",
    ),
    "raising-hook": Mode(
        HEADER
        + quant("lost")
        + """
@hookimpl
def dovetail_register_spec_decoders(register):
    raise RuntimeError("the driver answers 7")
""",
        "RuntimeError: the driver answers 7.",
        REPAIR,
    ),
    "exit": Mode("raise SystemExit('goodbye')", "SystemExit: goodbye.", REPAIR),
    "misspelt-hook": Mode(
        HEADER + "@hookimpl\ndef dovetail_register_platform(register): pass",
        "dovetail_register_platform is not a hook. Did you mean 'dovetail_register_platforms'?",
        REPAIR,
    ),
    "bare-hook": Mode(
        "def dovetail_register_platforms(register): pass",
        "dovetail_register_platforms lacks @dovetail.hookimpl, so it would never be called; add it.",
        REPAIR,
    ),
    "name-clash": Mode(
        HEADER + quant("none"),
        "quantization method 'none' of plugin 'name-clash' (dist-name-clash 1.2.3) is already registered by "
        "plugin 'builtin' (dovetail-core",
        "Rename one, or leave one plugin out with DOVETAIL_DISABLE_PLUGINS.",
    ),
    "wrong-version": Mode(
        HEADER + quant("future", api=9),
        "for version 9 of the quant contract; this core speaks version 1 and accepts plugins made for 1.",
        "Install a newer release of dovetail-core.",
    ),
    "heavy-import": Mode(
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "its plugin module imports torch, which every command would pay for.",
        "move the import into the module that a target names.",
    ),
}


def module(name):
    return name.replace("-", "_")


def simple(package, name, source, distribution=None):
    """A distribution of one module."""
    distribution = distribution or f"dist-{name}"
    file = f"{module(distribution)}_plugin"
    return package(name=distribution, version="1.2.3", files={f"{file}.py": source}, plugins={name: file})


def healthy(package):
    return simple(package, "neighbour", GOOD)


@pytest.fixture(scope="module")
def broken(install, package):
    """Every way to fail, side by side, and a healthy neighbour."""
    packages = [
        package(
            name=f"dist-{name}", version="1.2.3", files={f"{module(name)}.py": mode.source},
            plugins={name: module(name)}, requires=mode.requires,
        )
        for name, mode in MODES.items()
    ]  # fmt: skip
    return install([*packages, healthy(package)])


@pytest.fixture(scope="module")
def discovered(broken):
    return broken.plugins()


@pytest.mark.parametrize("name", MODES)
def test_discovered_it_is_quarantined(discovered, name):
    mode, plugin = MODES[name], discovered[name]
    assert (plugin["distribution"], plugin["version"]) == (f"dist-{name}", "1.2.3")
    assert (plugin["state"], plugin["asked"]) == ("quarantined", False)
    assert mode.cause in plugin["error"]
    assert mode.remedy.format(name=name) in f"{plugin['error']} {plugin['remedy']}"
    assert plugin["remedy"].endswith(f"Or leave it out with DOVETAIL_DISABLE_PLUGINS={name}.")
    assert "Traceback (most recent call last)" in plugin["traceback"]


def test_neighbours_are_unaffected(discovered):
    well = {name for name, plugin in discovered.items() if plugin["state"] == "loaded"}
    assert {"builtin", "models", "neighbour"} <= well
    assert not well & set(MODES)
    assert discovered["neighbour"]["provides"] == {"attention": ["neighbour"]}


@pytest.mark.parametrize("name", MODES)
def test_asked_for_nothing_starts(broken, name):
    ran = broken.dovetail("--plugins", f"models,{name}", "generate", "--prompt", "x")
    mode = MODES[name]
    assert ran.code == 2
    assert ran.out == ""
    assert f"plugin '{name}' (dist-{name} 1.2.3), which failed: " in ran.err
    assert mode.cause in ran.err
    assert mode.remedy.format(name=name) in ran.err
    assert "Or take it off DOVETAIL_PLUGINS." in ran.err
    assert "Traceback" not in ran.err


def test_asked_for_a_server_refuses_as_well(broken):
    ran = broken.dovetail("--plugins", "models,raising-hook", "serve", "--port", "0")
    assert ran.code == 2
    assert "'raising-hook' (dist-raising-hook 1.2.3), which failed: RuntimeError: the driver answers 7." in ran.err


def test_named_by_an_option_the_refusal_tells_of_the_quarantined_plugin(broken):
    ran = broken.dovetail("explain", "--quantization", "lost")
    assert ran.code == 1
    assert (
        "The plugin 'raising-hook' (dist-raising-hook 1.2.3) would have registered lost but failed to load: "
        "RuntimeError: the driver answers 7. " + REPAIR.format(name="raising-hook")
    ) in " ".join(ran.out.split())


def test_table_shows_cause_and_remedy(broken):
    ran = broken.dovetail("plugins")
    assert ran.code == 0
    for name, mode in MODES.items():
        assert f"plugin '{name}' (dist-{name} 1.2.3) is quarantined: " in ran.out
        assert mode.cause in ran.out
    assert ran.err == ""


def test_two_distributions_with_one_plugin_name(install, package):
    site = install([simple(package, "twin", HEADER + quant(x), f"dist-{x}") for x in "ab"])
    ran = site.dovetail("--plugins", "twin,models", "generate", "--prompt", "x")
    assert ran.code == 2
    assert "Two installed distributions call a plugin 'twin': dist-a and dist-b. Uninstall one." in ran.err


WARNED = {
    "slow": (HEADER + quant("slow") + "\nimport time; time.sleep(1.05)", "slow: its import took 1."),
    "needy": (
        HEADER + quant("needy", on_load=True, requires=("libquill>=2",)),
        "'needy' cannot be used: it requires libquill>=2, which is not installed; run: pip install 'libquill>=2'.",
    ),
}


@pytest.fixture(scope="module")
def unwell(install, package):
    """Plugins that load and are not right, and a healthy one."""
    return install([*(simple(package, name, source) for name, (source, _) in WARNED.items()), healthy(package)])


def test_slow_and_needy_plugins_load_with_a_warning(unwell):
    found = unwell.plugins()
    for name, (_, warning) in WARNED.items():
        assert found[name]["state"] == "loaded"
        assert warning in found[name]["warnings"][0]
    assert found["slow"]["seconds"] > 1
    assert found["neighbour"]["warnings"] == []


def test_missing_requirement_refuses_what_was_named(unwell):
    ran = unwell.dovetail("--disable-plugins", "slow", "explain", "--quantization", "needy")
    assert ran.code == 1
    said = " ".join(ran.out.split())
    assert (
        "'needy' of plugin 'needy' (dist-needy 1.2.3): requires libquill>=2, which is not installed; "
        "run: pip install 'libquill>=2'."
    ) in said


def test_lists_act_before_import(install, package, tmp_path):
    touched = f"import pathlib; pathlib.Path({str(tmp_path / 'touched')!r}).touch()"
    site = install([simple(package, "mark", touched), healthy(package)])
    for option in (["--disable-plugins", "mark"], ["--plugins", "neighbour"]):
        assert site.dovetail(*option, "plugins").code == 0
        assert not (tmp_path / "touched").exists()
    assert site.dovetail("plugins").code == 0
    assert (tmp_path / "touched").exists()


@pytest.mark.slow
def test_hanging_import_tells_who_hangs(install, package):
    ran = install([simple(package, "hung", "import time\ntime.sleep(6)")]).dovetail("plugins", "--json")
    assert "dovetail: plugin 'hung' (dist-hung 1.2.3) has been loading for 5 s, now at " in ran.err
    assert "dist_hung_plugin.py:2. If it hangs, leave it out with DOVETAIL_DISABLE_PLUGINS=hung." in ran.err

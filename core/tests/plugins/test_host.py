"""The plugin host: isolation of failures, allow and deny lists, what it records."""

import logging
import sys

import pytest

from dovetail.cli.commands import COMMANDS
from dovetail.errors import ConfigError, PluginLoadError
from dovetail.plugins.host import PluginHost
from dovetail.testing.fake_plugins import install

HEADER = """
from dovetail import hookimpl
from dovetail.plugins.manifest import AttentionManifest, ModelManifest, PlatformManifest
"""

GOOD = (
    HEADER
    + """
@hookimpl
def dovetail_register_models(register):
    register(ModelManifest(name="toy", summary="A toy.", architectures=("ToyForCausalLM",)), "toys.model:Toy")
"""
)


def chip(name, **kwargs):
    extra = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    return f"""
@hookimpl
def dovetail_register_platforms(register):
    manifest = PlatformManifest(
        name={name!r}, summary="A chip.", device_type="meta", dtypes=("float32",), attention=("reference",){extra}
    )
    register(manifest, "chips.platform:Chip")
"""


def status(discovery, name):
    (found,) = [plugin for plugin in discovery.plugins if plugin.name == name]
    return found


def fail(site, source, **kwargs):
    """Discover with one broken plugin beside a good one, and check that only the broken one is lost."""
    install(site, "broken", HEADER + source, **kwargs)
    install(site, "good", GOOD)
    discovery = PluginHost().discover()
    broken = status(discovery, "broken")
    assert broken.state == "quarantined"
    assert "DOVETAIL_DISABLE_PLUGINS=broken" in broken.remedy
    assert (broken.distribution, broken.version) == ("dist-broken", "1.0")
    assert "Traceback" in broken.traceback
    assert status(discovery, "good").state == "loaded"
    assert status(discovery, "builtin").state == "loaded"
    assert "toy" in discovery.registries.models
    assert all(entry.plugin != "broken" for r in discovery.registries.by_kind().values() for entry in r)
    return broken


def test_core_registers_its_own_parts_through_the_same_hooks(site):
    discovery = PluginHost().discover()
    builtin = status(discovery, "builtin")
    assert builtin.distribution == "dovetail-core"
    assert builtin.provides == {
        "platforms": ("cpu",),
        "attention": ("cpu", "blocked", "reference"),
        "quant": ("none",),
        "commands": tuple(COMMANDS),
    }
    assert discovery.registries.platforms.get("cpu").plugin == "builtin"


def test_plugin_is_loaded_with_its_owner_recorded(site):
    module = install(site, "good", GOOD, version="2.5")
    discovery = PluginHost().discover()
    entry = discovery.registries.models.get("toy")
    assert (entry.plugin, entry.distribution, entry.version) == ("good", "dist-good", "2.5")
    assert entry.target == "toys.model:Toy"
    assert status(discovery, "good").provides == {"models": ("toy",)}
    assert module in sys.modules
    assert "toys" not in sys.modules, "targets are lazy"


ALL_HOOKS = {
    "dovetail_register_platforms": (
        "platforms",
        "PlatformManifest(name='x', summary='', device_type='meta', dtypes=(), attention=())",
    ),
    "dovetail_register_attention_backends": (
        "attention",
        "AttentionManifest(name='x', summary='', device_types=(), dtypes=())",
    ),
    "dovetail_register_models": ("models", "ModelManifest(name='x', summary='', architectures=())"),
    "dovetail_register_quant_methods": ("quant", "QuantManifest(name='x', summary='')"),
    "dovetail_register_spec_decoders": ("spec_decoders", "SpecDecoderManifest(name='x', summary='')"),
    "dovetail_register_commands": ("commands", "CommandManifest(name='x', summary='')"),
}


@pytest.mark.parametrize("hook", ALL_HOOKS)
def test_each_hook_fills_its_registry(site, hook):
    kind, manifest = ALL_HOOKS[hook]
    source = f"""
from dovetail import hookimpl
from dovetail.plugins.manifest import *

@hookimpl
def {hook}(register): register({manifest}, "a.b:C")
"""
    install(site, "one", source)
    discovery = PluginHost().discover()
    assert status(discovery, "one").provides == {kind: ("x",)}
    assert discovery.registries.by_kind()[kind].get("x").plugin == "one"


def test_import_error(site):
    broken = fail(site, "import no_such_module_anywhere")
    assert broken.error == "ModuleNotFoundError: No module named 'no_such_module_anywhere'."
    assert "does not declare it as a dependency" in broken.remedy


def test_syntax_error(site):
    assert fail(site, "def").error.startswith("SyntaxError")


def test_exit_at_import_does_not_end_the_host(site):
    assert fail(site, "raise SystemExit('bye')").error == "SystemExit: bye."


def test_raising_hook_loses_what_it_registered_before(site):
    source = """
@hookimpl
def dovetail_register_attention_backends(register):
    raise RuntimeError("no driver\\nline two")
"""
    broken = fail(site, chip("chip") + source)
    assert broken.error == "RuntimeError: no driver line two."
    assert broken.provides == {"platforms": ("chip",)}, "what was lost is named"


@pytest.mark.parametrize("decorator", ["@hookimpl", ""])
def test_misspelt_hook_is_that_plugins_error(site, decorator):
    broken = fail(site, f"{decorator}\ndef dovetail_register_platform(register): pass")
    assert "dovetail_register_platform is not a hook. Did you mean 'dovetail_register_platforms'?" in broken.error


def test_hook_without_decorator_is_an_error(site):
    broken = fail(site, "def dovetail_register_models(register): pass")
    assert "lacks @dovetail.hookimpl" in broken.error


def test_misspelt_hook_by_specname_is_found_by_check_pending(site):
    broken = fail(site, "@hookimpl(specname='dovetail_register_chips')\ndef register_chips(register): pass")
    assert "dovetail_register_chips" in broken.error


def test_unknown_hook_argument(site):
    broken = fail(site, "@hookimpl\ndef dovetail_register_models(registrar): pass")
    assert "registrar" in broken.error


def test_clash_names_both_owners_and_keeps_the_first(site):
    broken = fail(site, chip("cpu"))
    assert "platform 'cpu' of plugin 'broken' (dist-broken 1.0)" in broken.error
    assert "already registered by plugin 'builtin' (dovetail-core" in broken.error


def test_clash_within_one_plugin(site):
    twice = """
@hookimpl
def dovetail_register_models(register):
    for _ in range(2):
        register(ModelManifest(name="twin", summary="", architectures=()), "m:M")
"""
    assert "model family 'twin'" in fail(site, twice).error


def test_wrong_contract_version(site):
    broken = fail(site, chip("chip", api=7))
    assert "version 7 of the platform contract" in broken.error
    assert "speaks version 1 and accepts plugins made for 1. Install a newer release of dovetail-core." in broken.error


def test_wrong_manifest_type(site):
    source = "@hookimpl\ndef dovetail_register_platforms(register): register({'name': 'chip'}, 'a:B')"
    assert "it must be a PlatformManifest" in fail(site, source).error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", "high"),
        ("api", True),
        ("api", "1"),
        ("requires", "fancy"),
        ("requires", None),
        ("kv_dtypes", "auto"),
        ("max_context", "4096"),
        ("ops", {"linear": 1}),
    ],
)
def test_field_of_the_wrong_type(site, field, value):
    broken = fail(site, chip("chip", **{field: value}))
    assert "registers 'chip' with a field of the wrong type: Expected" in broken.error
    assert f"`$.{field}`; write it as PlatformManifest declares it." in broken.error


def test_value_that_no_other_process_could_read(site):
    source = """
from dovetail.plugins.manifest import SpecDecoderManifest

@hookimpl
def dovetail_register_spec_decoders(register):
    register(SpecDecoderManifest(name="guess", summary="", defaults={"step": object()}), "g:G")
"""
    assert "Encoding objects of type object is unsupported" in fail(site, source).error


def test_lists_are_read_as_the_declared_types(site):
    install(site, "listing", HEADER + chip("chip", ops=["linear"], kv_dtypes=["auto"]))
    registries = PluginHost().discover().registries
    manifest = registries.platforms.get("chip").manifest
    assert (manifest.ops, manifest.kv_dtypes) == (frozenset({"linear"}), ("auto",))
    assert type(registries).decode(registries.encode()).platforms.get("chip").manifest == manifest


@pytest.mark.parametrize("target", ["chips.platform", "chips.platform:", ":Chip", "a b:C", "chips:Chip()"])
def test_malformed_target(site, target):
    broken = fail(site, chip("chip").replace("chips.platform:Chip", target))
    assert "'package.module:Attribute'" in broken.error


@pytest.mark.parametrize("name", ["", "two words", "-x"])
def test_malformed_name(site, name):
    assert f"registers the name {name!r}" in fail(site, chip(name)).error


def test_entry_point_must_name_a_module(site):
    broken = fail(site, "thing = 1", target="fake_broken_dist_broken:thing")
    assert "must name a module" in broken.error


def test_two_distributions_with_one_plugin_name(site):
    install(site, "twin", GOOD, distribution="dist-a")
    install(site, "twin", GOOD, distribution="dist-b")
    first, second = [p for p in PluginHost().discover().plugins if p.name == "twin"]
    assert (first.state, second.state) == ("loaded", "quarantined")
    assert first.distribution in second.error
    assert second.distribution in second.error


def test_failure_is_warned_about_once_with_its_owner(site, caplog):
    install(site, "warned", "import no_such_module_once")
    with caplog.at_level(logging.WARNING, logger="dovetail.plugins"):
        PluginHost().discover()
        PluginHost().discover()
    (record,) = [r for r in caplog.records if "warned" in r.getMessage()]
    assert "plugin 'warned' (dist-warned 1.0) failed to load" in record.getMessage()
    assert "no_such_module_once" in record.getMessage()


def test_asked_for_failure_is_marked_and_not_a_mere_warning(site, caplog, monkeypatch):
    install(site, "wanted", "import no_such_module_wanted")
    monkeypatch.setenv("DOVETAIL_PLUGINS", "wanted")
    with caplog.at_level(logging.WARNING, logger="dovetail.plugins"):
        discovery = PluginHost().discover()
    wanted = status(discovery, "wanted")
    assert (wanted.asked, wanted.state) == (True, "failed")
    with pytest.raises(PluginLoadError, match=r"plugin 'wanted' \(dist-wanted 1.0\), which failed: ModuleNotFound"):
        discovery.registries.refuse_broken()
    assert not caplog.records


def test_allow_list_acts_before_import_and_keeps_builtin(site, monkeypatch):
    module = install(site, "good", GOOD)
    other = install(site, "other", "raise RuntimeError('imported')")
    monkeypatch.setenv("DOVETAIL_PLUGINS", " good ,")
    discovery = PluginHost().discover()
    assert status(discovery, "builtin").state == "loaded"
    assert status(discovery, "good").state == "loaded"
    assert status(discovery, "other").state == "disabled"
    assert module in sys.modules
    assert other not in sys.modules


def test_empty_allow_list_leaves_builtin_alone(site, monkeypatch):
    install(site, "good", GOOD)
    monkeypatch.setenv("DOVETAIL_PLUGINS", "")
    states = {plugin.name: plugin.state for plugin in PluginHost().discover().plugins}
    assert states.pop("builtin") == "loaded"
    assert set(states.values()) == {"disabled"}


def test_deny_list_acts_before_import(site, monkeypatch):
    module = install(site, "good", GOOD)
    monkeypatch.setenv("DOVETAIL_DISABLE_PLUGINS", "good")
    discovery = PluginHost().discover()
    assert status(discovery, "good").state == "disabled"
    assert module not in sys.modules
    assert "toy" not in discovery.registries.models


def test_arguments_come_before_the_environment(site, monkeypatch):
    install(site, "good", GOOD)
    monkeypatch.setenv("DOVETAIL_DISABLE_PLUGINS", "good")
    assert status(PluginHost(disable=()).discover(), "good").state == "loaded"


@pytest.mark.parametrize("variable", ["DOVETAIL_PLUGINS", "DOVETAIL_DISABLE_PLUGINS"])
def test_unknown_name_in_a_list_is_an_error_with_the_nearest(site, monkeypatch, variable):
    install(site, "good", GOOD)
    monkeypatch.setenv(variable, "goood")
    with pytest.raises(ConfigError, match=rf"{variable} names 'goood'.*Did you mean 'good'\?.*Installed:.*builtin"):
        PluginHost().discover()


def test_builtin_cannot_be_switched_off(site, monkeypatch):
    monkeypatch.setenv("DOVETAIL_DISABLE_PLUGINS", "builtin")
    with pytest.raises(ConfigError, match="cannot be switched off"):
        PluginHost().discover()


def test_asked_for_and_switched_off_at_once_is_an_error(site):
    install(site, "good", GOOD)
    with pytest.raises(ConfigError, match="both name 'good'"):
        PluginHost(allow=["good"], disable=["good"]).discover()


def test_trace_prints_calls_and_registrations(site, monkeypatch, capsys):
    install(site, "good", GOOD)
    PluginHost().discover()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DOVETAIL_TRACE_HOOKS", "1")
    PluginHost().discover()
    lines = capsys.readouterr().err.splitlines()
    call = lines.index("dovetail hook: good: dovetail_register_models(register)")
    assert lines[call + 1] == "dovetail hook: good: + models toy -> toys.model:Toy"


def test_trace_switch_must_be_0_or_1(site, monkeypatch):
    monkeypatch.setenv("DOVETAIL_TRACE_HOOKS", "yes")
    with pytest.raises(ConfigError, match="DOVETAIL_TRACE_HOOKS is 'yes'"):
        PluginHost()


def test_registering_after_start_up_is_refused(site):
    late = HEADER + "saved = []\n@hookimpl\ndef dovetail_register_models(register): saved.append(register)\n"
    module = install(site, "late", late)
    registries = PluginHost().discover().registries
    from dovetail.plugins.manifest import ModelManifest

    with pytest.raises(PluginLoadError, match="after start-up"):
        sys.modules[module].saved[0](ModelManifest(name="late", summary="", architectures=()), "m:M")
    assert "late" not in registries.models


def test_nobody_takes_the_place_of_the_core(site):
    install(site, "builtin", GOOD, distribution="aaa-first")
    first, second = (plugin for plugin in PluginHost().discover().plugins if plugin.name == "builtin")
    assert (first.distribution, first.state) == ("dovetail-core", "loaded")
    assert (second.distribution, second.state) == ("aaa-first", "quarantined")


def test_a_field_of_a_newer_core_suggests_an_upgrade(site):
    install(site, "early", HEADER + chip("early", antigravity=True))
    found = status(PluginHost().discover(), "early")
    assert "unexpected keyword argument 'antigravity'" in found.error
    assert "upgrade it" in found.remedy

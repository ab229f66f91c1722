"""Registries: look-up, misses, and the way to another process."""

import pytest

from dovetail.errors import PluginConflictError, PluginLoadError, UnknownNameError
from dovetail.plugins.host import PluginHost
from dovetail.plugins.manifest import QuantManifest, SpecDecoderManifest
from dovetail.plugins.registry import Entry, PluginStatus, Registries, Registry
from dovetail.testing.fake_plugins import install


def entry(name, *, priority=0, target="json:loads", plugin="p"):
    manifest = QuantManifest(name=name, summary="", priority=priority, ops=frozenset({"linear"}))
    return Entry(manifest=manifest, target=target, plugin=plugin, distribution="d", version="1")


def test_lookup_iteration_and_order():
    registry = Registry(kind="thing")
    for name, priority in (("b", 0), ("a", 0), ("c", 5)):
        registry.add(entry(name, priority=priority))
    assert registry.names() == ("a", "b", "c")
    assert [e.name for e in registry] == ["b", "a", "c"], "the order of registration"
    assert [e.name for e in registry.ranked()] == ["c", "a", "b"], "priority, then name"
    assert (len(registry), "a" in registry, "x" in registry) == (3, True, False)
    assert registry.get("a").name == "a"


def test_clash():
    registry = Registry(kind="thing")
    registry.add(entry("a", plugin="first"))
    with pytest.raises(
        PluginConflictError, match=r"thing 'a' of plugin 'second'.*already registered by plugin 'first'"
    ):
        registry.add(entry("a", plugin="second"))


def test_miss_names_the_nearest_the_known_and_a_way_out():
    registry = Registry(kind="thing")
    registry.add(entry("alpha"))
    registry.add(entry("beta"))
    with pytest.raises(UnknownNameError) as caught:
        registry.get("alhpa")
    message = str(caught.value)
    assert "No thing is named 'alhpa'. Did you mean 'alpha'? Registered: alpha, beta." in message
    assert "`dovetail plugins` lists what is installed" in message


def test_miss_in_an_empty_registry():
    with pytest.raises(UnknownNameError, match=r"No thing is named 'x'\. Registered: none\."):
        Registry(kind="thing").get("x")


def test_miss_mentions_plugins_that_are_broken_or_switched_off():
    registries = Registries()
    common = {"distribution": "d", "version": "1"}
    registries.freeze(
        (
            PluginStatus(name="early", state="quarantined", error="ImportError: libx", **common),
            PluginStatus(name="late", state="quarantined", error="KeyError: 1", provides={"quant": ("q8",)}, **common),
            PluginStatus(name="off", state="disabled", **common),
            PluginStatus(name="out", state="disabled", **common),
            PluginStatus(name="fine", state="loaded", **common),
        )
    )
    with pytest.raises(UnknownNameError) as caught:
        registries.quant.get("q8")
    message = str(caught.value)
    assert "plugin 'early' (d 1) might provide it but failed to load: ImportError: libx" in message
    assert "plugin 'late' (d 1) would have registered q8 but failed to load: KeyError: 1" in message
    assert "Installed but switched off, and might provide it: plugin 'off' (d 1), plugin 'out' (d 1)." in message
    assert "fine" not in message


def test_load_imports_the_target():
    import json

    assert entry("a").load() is json.loads


@pytest.mark.parametrize("target", ["no_such_module_x:Y", "json:NoSuchThing"])
def test_load_failure_names_the_owner(target):
    with pytest.raises(PluginLoadError, match=r"'a' of plugin 'p' \(d 1\) cannot be imported from") as caught:
        entry("a", target=target).load()
    assert caught.value.__cause__ is not None


def test_round_trip_to_another_process(site):
    install(site, "broken", "import no_such_module_round")
    registries = PluginHost().discover().registries
    registries.spec_decoders.entries["s"] = Entry(
        manifest=SpecDecoderManifest(name="s", summary="", defaults={"k": 3, "words": ["a"]}),
        target="a:B",
        plugin="p",
        distribution="d",
        version="1",
    )
    again = Registries.decode(registries.encode())
    assert again == registries
    assert type(again.platforms.get("cpu").manifest) is type(registries.platforms.get("cpu").manifest)
    assert again.platforms.frozen
    with pytest.raises(UnknownNameError, match="no_such_module_round"):
        again.platforms.get("chip")

"""Contract versions: this core's and the one before are accepted; deprecations come from one ledger and end in time."""

import re

import pytest

from dovetail import __version__, deprecations
from dovetail.contracts import API_VERSIONS, accepted
from dovetail.deprecations import LEDGER, Deprecation, contract, hook, overdue
from dovetail.plugins.host import PluginHost
from dovetail.testing.fake_plugins import install

OLD = Deprecation(
    what=contract("quant", 1), instead="implement version 2", since="0.2", removed_in="0.3"
)


def discover(site, api):
    source = f"""
        from dovetail import hookimpl
        from dovetail.plugins.manifest import QuantManifest

        @hookimpl
        def dovetail_register_quant_methods(register):
            register(QuantManifest(name="q", summary="", api={api!r}), "json:loads")
    """
    install(site, "dated", source)
    return next(plugin for plugin in PluginHost().discover(warn=False).plugins if plugin.name == "dated")


@pytest.mark.parametrize(("now", "versions"), [(1, (1,)), (2, (1, 2)), (7, (6, 7))])
def test_accepted_are_this_version_and_the_one_before(monkeypatch, now, versions):
    monkeypatch.setitem(API_VERSIONS, "quant", now)
    assert accepted("quant") == versions


def test_previous_version_loads_with_a_notice(site, monkeypatch):
    monkeypatch.setitem(API_VERSIONS, "quant", 2)
    monkeypatch.setattr(deprecations, "LEDGER", (OLD,))
    status = discover(site, 1)
    assert status.state == "loaded"
    assert status.provides == {"quant": ("q",)}
    assert status.warnings == (
        "'q' is made for an old contract: version 1 of the quant contract is deprecated since 0.2 and goes in 0.3; "
        "implement version 2 instead.",
    )


@pytest.mark.parametrize(("api", "upgrade"), [(1, "dist-dated"), (4, "dovetail-core"), (0, "dist-dated")])
def test_other_versions_are_refused_with_both_numbers_and_who_has_to_move(site, monkeypatch, api, upgrade):
    monkeypatch.setitem(API_VERSIONS, "quant", 3)
    status = discover(site, api)
    assert status.state == "quarantined"
    assert (
        f"for version {api} of the quant contract; this core speaks version 3 and accepts plugins made for 2 and 3. "
        f"Install a newer release of {upgrade}."
    ) in status.error


def test_deprecated_hook_is_noticed(site, monkeypatch):
    going = Deprecation(
        what=hook("dovetail_register_quant_methods"), instead="use another hook", since="0.2", removed_in="0.4"
    )
    monkeypatch.setattr(deprecations, "LEDGER", (going,))
    assert discover(site, 1).warnings == (
        "hook dovetail_register_quant_methods is deprecated since 0.2 and goes in 0.4; use another hook instead.",
    )


def test_nothing_in_the_ledger_is_overdue():
    assert overdue(__version__) == [], "remove what these deprecated, and the entries"


def test_overdue():
    assert overdue("0.2.9", [OLD]) == []
    assert overdue("0.3", [OLD]) == [OLD]
    assert overdue("1.0.0", [OLD]) == [OLD]


def test_every_old_version_that_is_accepted_is_in_the_ledger():
    old = [contract(name, accepted(name)[0]) for name in API_VERSIONS if len(accepted(name)) > 1]
    assert set(old) <= {entry.what for entry in LEDGER}


def test_ledger_is_well_formed():
    for entry in LEDGER:
        assert re.fullmatch(r"\d+\.\d+", entry.since), entry
        assert re.fullmatch(r"\d+\.\d+", entry.removed_in), entry

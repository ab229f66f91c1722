"""Suites as a whole: their ids, what they import, and that each kind of registration has one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dovetail
from dovetail.plugins.manifest import AttentionManifest
from dovetail.plugins.registration import HOOKS
from dovetail.testing import conformance
from dovetail.testing.conformance import Scenario, Suite, needs, registered, scenarios, unregistered
from dovetail.testing.conformance.catalogue import ALL, SUITES
from dovetail.testing.conformance.run import run

SOURCES = Path(dovetail.__file__).parent
ALLOWED = {"dovetail", "torch", "pytest", "numpy", "msgspec", "click", "__future__"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_every_kind_of_registration_has_a_suite():
    assert set(SUITES) == {hook.kind for hook in HOOKS}


@pytest.mark.parametrize("suite", ALL, ids=lambda suite: suite.__name__)
def test_ids_count_up(suite):
    ids = [found.id for found in scenarios(suite)]
    assert ids == [f"{suite.contract}.{i + 1}" for i in range(len(ids))]


@pytest.mark.parametrize("suite", ALL, ids=lambda suite: suite.__name__)
def test_needs_are_fields_of_a_manifest(suite):
    from dovetail.testing.conformance import ExecutorManifest

    manifests = {hook.kind: hook.manifest for hook in HOOKS} | {"executors": ExecutorManifest}
    asked = {capability for found in scenarios(suite) for capability in found.needs}
    assert asked <= set(getattr(manifests.get(suite.kind), "__dataclass_fields__", ()))


def test_pytest_is_imported_by_the_suites_alone():
    users = {path for path in SOURCES.rglob("*.py") if "pytest" in imported(path)}
    assert users
    assert all(path.parent == SOURCES / "testing/conformance" for path in users)


def test_suites_need_torch_and_pytest_alone():
    import sys

    for path in (SOURCES / "testing/conformance").glob("*.py"):
        assert imported(path) - ALLOWED - set(sys.stdlib_module_names) <= {"transformers", "safetensors"}, path


class Probing(Suite):
    """A suite of suites."""

    contract = "probing"
    kind = "attention"

    def test_passes(self, dtype):
        """probing.1: this passes."""

    @needs("tree")
    def test_needs(self):
        """probing.2: this is skipped."""

    def test_fails(self, tmp_path):
        """probing.3: this fails
        in words.

        Not in these.
        """
        self.equal(1 + 1, 3, "one and one")

    def test_raises(self):
        """probing.4: this raises."""
        raise KeyError("lost")


def outcomes(**suites):
    return {result.scenario: (result.outcome, result.reason) for result in run(suites)}


def test_what_a_run_tells():
    probing = type("TestProbing", (Probing,), {"subject": registered("reference")})
    assert outcomes(TestProbing=probing) == {
        "probing.1": ("passed", ""),
        "probing.2": ("skipped", "lacks tree"),
        "probing.3": ("failed", "probing.3: one and one: expected 3, got 2."),
        "probing.4": ("failed", "KeyError: 'lost'"),
    }
    assert Scenario.of(Probing.test_fails).behaviour == "this fails in words."
    (only,) = run({"TestProbing": probing}, only=["probing.4"])
    assert only.test == "test_raises"
    assert 'raise KeyError("lost")' in only.details


def test_a_dtype_that_torch_lacks_is_named():
    manifest = AttentionManifest(name="odd", summary="", device_types=("cpu",), dtypes=("float31",))
    subject = unregistered(object, manifest)
    (outcome, reason) = outcomes(TestOdd=type("TestOdd", (Probing,), {"subject": subject}))["probing.1"]
    assert (outcome, reason) == ("failed", "probing.1: the manifest's dtype 'float31' is none of torch's.")


def test_a_scenario_must_have_an_id():
    def test_something():
        """It works."""

    with pytest.raises(ValueError, match=r"must begin with 'contract\.number: behaviour'"):
        Scenario.of(test_something)


def test_pytest_takes_nothing_that_test_files_import_for_tests():
    exported = [getattr(conformance, name) for name in conformance.__all__]
    named_like_tests = [thing for thing in exported if getattr(thing, "__name__", "").startswith("Test")]
    assert named_like_tests
    assert not any(getattr(thing, "__test__", True) for thing in named_like_tests)

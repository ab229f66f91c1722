"""Contracts, hooks and environment stay small and documented."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import dovetail.contracts
from dovetail import env, hookspecs
from dovetail.plugins.host import HOOKS

CORE = Path(__file__).parents[2] / "core/src/dovetail"
HOOK_FUNCTIONS = {
    name: function for name, function in vars(hookspecs).items() if name.startswith("dovetail_") and callable(function)
}
CONTRACTS = [
    member
    for info in pkgutil.iter_modules(dovetail.contracts.__path__)
    for member in vars(importlib.import_module(f"dovetail.contracts.{info.name}")).values()
    if inspect.isclass(member) and inspect.isabstract(member) and member.__module__ == f"dovetail.contracts.{info.name}"
]


def test_at_most_a_dozen_hooks_and_the_host_calls_each():
    assert [hook.name for hook in HOOKS] == list(HOOK_FUNCTIONS)
    assert len(HOOKS) <= 12


@pytest.mark.parametrize("name", HOOK_FUNCTIONS)
def test_every_hook_says_where_it_runs_whether_it_may_raise_and_since_when(name):
    doc = inspect.getdoc(HOOK_FUNCTIONS[name]) or ""
    assert re.search(r"Process: .+\. May raise: .+\. Since: \d+\.\d+\.", doc), doc
    assert inspect.signature(HOOK_FUNCTIONS[name]).return_annotation in ("None", None)


@pytest.mark.parametrize("name", HOOK_FUNCTIONS)
def test_every_hook_is_exercised_by_a_test(name):
    tests = CORE.parents[1] / "tests/plugins"
    assert any(name in path.read_text(encoding="utf-8") for path in tests.glob("test_*.py"))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.__name__)
def test_every_contract_has_at_most_ten_methods_each_documented(contract):
    own = {name: member for name, member in vars(contract).items() if getattr(member, "__isabstractmethod__", False)}
    assert 0 < len(own) <= 10
    for name, member in own.items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        assert function.__doc__ or name == "__init__", f"{contract.__name__}.{name} has no docstring"


def test_the_contracts_are_seen():
    names = {"Platform", "AttentionBackend", "Model", "QuantMethod", "SpecDecoder", "Executor"}
    assert names <= {contract.__name__ for contract in CONTRACTS}


def test_every_environment_variable_is_documented_and_there_are_few():
    documented = set(re.findall(r"``(DOVETAIL_\w+)``", env.__doc__))
    used = set()
    for path in CORE.rglob("*.py"):
        used |= set(re.findall(r"\bDOVETAIL_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    assert used == documented
    assert len(documented) <= 20

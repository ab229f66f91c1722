"""What all suites share: the subject, scenario ids, capability gates, and failures that say what was expected."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import msgspec
import pytest
import torch
from torch import Tensor

from dovetail.testing.conformance.report import UNAVAILABLE
from dovetail.testing.conformance.subject import Subject, Tested

F = TypeVar("F", bound=Callable[..., Any])

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest error of a result, in units of the largest expected value, by the dtype it is computed in."""

_DOCSTRING = re.compile(r"([a-z]+\.\d+): (.+)")


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One behaviour that a suite requires.

    Attributes:
        id: ``"contract.number"``, which never changes its meaning.
        behaviour: in one sentence.
        test: the name of the test method.
        needs: capabilities without which it is skipped.
    """

    id: str
    behaviour: str
    test: str
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Scenario:
        """Read the first paragraph of a test's docstring, ``contract.number: behaviour``."""
        paragraph = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        found = _DOCSTRING.fullmatch(paragraph)
        if found is None:
            raise ValueError(f"{function.__qualname__}: the docstring must begin with 'contract.number: behaviour'.")
        return cls(
            id=found[1], behaviour=found[2], test=function.__name__, needs=getattr(function, "capabilities", ())
        )


def needs(*capabilities: str) -> Callable[[F], F]:
    """Skip a test, naming the capability, unless the manifest's fields of these names are true (or not empty)."""

    def mark(function: F) -> F:
        function.capabilities = capabilities  # type: ignore[attr-defined]
        return function

    return mark


class Suite:
    """Base of all suites. A subclass whose name begins with ``Test`` and that sets ``subject`` is collected by pytest.

    Attributes:
        contract: the first part of its scenario ids.
        kind: the registry that :func:`~dovetail.testing.conformance.registered` looks into.
        subject: what is tested; the implementer's one line.
    """

    contract: ClassVar[str]
    kind: ClassVar[str]
    subject: ClassVar[Subject]
    scenario_id = ""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests that take ``dtype`` once for each activation dtype that the manifest lists."""
        if "dtype" in metafunc.fixturenames:
            names = self.manifest.dtypes
            metafunc.parametrize("dtype", [getattr(torch, name, name) for name in names], ids=names)

    @pytest.fixture(autouse=True)
    def _gate(self, request: pytest.FixtureRequest) -> None:
        """Know the scenario, and skip what the subject does not claim to do."""
        scenario = Scenario.of(request.function)
        self.scenario_id = scenario.id
        dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
        self.check(not isinstance(dtype, str), f"the manifest's dtype {dtype!r} is none of torch's.")
        for capability in scenario.needs:
            self.require(capability)

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Tensors here are small: threads that wait for each other would take most of the time."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @property
    def tested(self) -> Tested:
        """The class under test and its manifest."""
        return self.subject.find(self.kind)

    @property
    def manifest(self) -> Any:
        """What is declared about the class under test."""
        return self.tested.manifest

    def need_device(self, platform: Any) -> None:
        """Skip the test where the platform class says that it is not available."""
        probe = platform.probe()
        if not probe.available:
            pytest.skip(f"{UNAVAILABLE}{probe.reason}")

    def require(self, capability: str) -> None:
        """Skip the test unless the manifest's field of this name is true or not empty."""
        if not getattr(self.manifest, capability):
            self.lacks(capability)

    def lacks(self, capability: str) -> None:
        """Skip the test, naming the capability that the subject does not declare."""
        pytest.skip(f"lacks {capability}")

    def fail(self, message: str) -> None:
        """Fail the test, naming the scenario."""
        __tracebackhide__ = True
        pytest.fail(f"{self.scenario_id}: {message}", pytrace=False)

    def check(self, condition: bool, message: str) -> None:
        """Fail with ``message`` unless ``condition`` holds."""
        __tracebackhide__ = True
        if not condition:
            self.fail(message)

    def equal(self, actual: Any, expected: Any, what: str) -> None:
        """Require equality of plain values.

        Args:
            what: the value, and for which inputs.
        """
        __tracebackhide__ = True
        if actual != expected:
            self.fail(f"{what}: expected {expected!r}, got {actual!r}.")

    def close(self, actual: Tensor, expected: Tensor, what: str, *, dtype: torch.dtype, looser: float = 1) -> None:
        """Require equal shapes, the given dtype, finite values, and an error within the dtype's tolerance.

        Args:
            actual: from the class under test, on any device.
            expected: computed on the host in float64 or float32.
            what: the value, and for which inputs.
            dtype: that ``actual`` must have, and that rounds it.
            looser: factor on :data:`TOLERANCE`.
        """
        __tracebackhide__ = True
        self.equal(tuple(actual.shape), tuple(expected.shape), f"shape of {what}")
        self.equal(actual.dtype, dtype, f"dtype of {what}")
        self.near(actual, expected, what, looser * TOLERANCE[dtype])

    def near(self, actual: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
        """Require finite values and an error of at most ``tolerance`` times the largest expected value."""
        __tracebackhide__ = True
        if not expected.numel():
            return
        got, want = actual.detach().cpu().double(), expected.double()
        if not bool(got.isfinite().all()):
            self.fail(f"{what}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite.")
        error = (got - want).abs()
        allowed = tolerance * max(float(want.abs().max()), 1e-30)
        worst = int(error.argmax())
        if float(error.flatten()[worst]) > allowed:
            place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
            values = [float(tensor.flatten()[worst]) for tensor in (want, got, error)]
            self.fail(
                f"{what}: at {place} expected {values[0]:.6g}, got {values[1]:.6g}; the error {values[2]:.3g} exceeds "
                f"{allowed:.3g}, and {int((error > allowed).sum())} of {error.numel()} values are wrong."
            )


def scenarios(suite: type[Suite]) -> list[Scenario]:
    """The suite's scenarios, by number."""
    tests = [function for name, function in inspect.getmembers(suite, inspect.isfunction) if name.startswith("test_")]
    return sorted((Scenario.of(test) for test in tests), key=lambda found: int(found.id.partition(".")[2]))

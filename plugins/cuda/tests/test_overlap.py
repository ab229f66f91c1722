"""Kernels that may begin before the ones ahead have ended touch nothing until those have: no test would see a race."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "src/dovetail_cuda/kernels"
TOUCHES = ("load", "store", "atomic", "gather")


def overlapping(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "OVERLAP" in [argument.arg for argument in node.args.args]:
            yield node


def called(node):
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]


def problems(kernel):
    body = enumerate(kernel.body)
    waits = [i for i, statement in body if isinstance(statement, ast.Expr) and called(statement) == ["wait"]]
    if not waits:
        return ["does not wait in every program"]
    ahead = kernel.body[: waits[0]]
    names = [name for statement in ahead for name in called(statement)]
    found = [f"{name} before it waits" for name in names if name.startswith(TOUCHES)]
    if any(isinstance(child, ast.Return) for statement in ahead for child in ast.walk(statement)):
        found.append("returns before it waits")
    return found


PATHS = sorted(path for path in KERNELS.glob("*.py") if path.name != "overlap.py" and any(overlapping(path)))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_touches_nothing_before_it_waits(path):
    found = {kernel.name: problems(kernel) for kernel in overlapping(path)}
    assert {name: reasons for name, reasons in found.items() if reasons} == {}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("release(OVERLAP)\n x = tl.load(p)\n wait(OVERLAP)", "load before it waits"),
        ("if x:\n  wait(OVERLAP)\n tl.store(p, 1)", "does not wait in every program"),
        ("if x:\n  return\n wait(OVERLAP)", "returns before it waits"),
    ],
)
def test_notices(body, problem):
    kernel = ast.parse(f"def kernel(p, x, OVERLAP):\n {body}").body[0]
    assert problems(kernel) == [problem]

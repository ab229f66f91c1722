"""Kernels that may begin before the ones ahead have ended touch nothing until those have: no test would see a race.

What no such kernel writes, they may read.
"""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "src/dovetail_cuda/kernels"
TOUCHES = ("load", "store", "atomic", "gather")
UNWRITTEN = {"weight_ptr", "starts_ptr", "lengths_ptr", "positions_ptr", "slots_ptr", "table_ptr"}
"""Packed weights, and the tables that a step comes with."""


def overlapping(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "OVERLAP" in [argument.arg for argument in node.args.args]:
            yield node


def called(node):
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]


def sources(node, ahead):
    """Pointers that an expression comes from, through what statements ahead assign."""
    names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    found = {name for name in names if name.endswith("_ptr")}
    for i, statement in enumerate(ahead):
        if isinstance(statement, ast.Assign) and names & {getattr(target, "id", "") for target in statement.targets}:
            found |= sources(statement.value, ahead[:i])
    return found


def is_unwritten(call, ahead):
    """Whether it loads what no overlapped kernel writes."""
    name = called(call)[0]
    return name == "load" and bool(found := sources(call.args[0], ahead)) and found <= UNWRITTEN


def problems(kernel):
    body = enumerate(kernel.body)
    waits = [i for i, statement in body if isinstance(statement, ast.Expr) and called(statement) == ["wait"]]
    if not waits:
        return ["does not wait in every program"]
    ahead = kernel.body[: waits[0]]
    calls = [child for statement in ahead for child in ast.walk(statement) if isinstance(child, ast.Call)]
    touching = [call for call in calls if called(call)[0].startswith(TOUCHES) and not is_unwritten(call, ahead)]
    found = [f"{called(call)[0]} before it waits" for call in touching]
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
        ("release(OVERLAP)\n x = tl.load(x_ptr)\n wait(OVERLAP)", "load before it waits"),
        ("at = table_ptr + tl.load(x_ptr)\n x = tl.load(at)\n wait(OVERLAP)", "load before it waits"),
        ("tl.store(table_ptr, 1)\n wait(OVERLAP)", "store before it waits"),
        ("if x:\n  wait(OVERLAP)\n tl.store(p, 1)", "does not wait in every program"),
        ("if x:\n  return\n wait(OVERLAP)", "returns before it waits"),
    ],
)
def test_notices(body, problem):
    kernel = ast.parse(f"def kernel(p, x, OVERLAP):\n {body}").body[0]
    assert set(problems(kernel)) == {problem}


def test_lets_tables_be_read():
    body = "at = table_ptr + tl.load(positions_ptr + x)\n x = tl.load(at + 1)\n wait(OVERLAP)"
    assert problems(ast.parse(f"def kernel(p, x, OVERLAP):\n {body}").body[0]) == []

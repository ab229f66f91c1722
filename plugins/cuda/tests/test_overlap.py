"""Kernels that may begin before the ones ahead have ended touch nothing until those have: no test would see a race.

What no such kernel writes, they may read.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "src/dovetail_cuda/kernels"
READS = ("load", "copy")
TOUCHES = (*READS, "store", "atomic", "gather", "scatter")
UNWRITTEN = {"weights", "weight_ptr", "starts_ptr", "lengths_ptr", "positions_ptr", "slots_ptr", "table_ptr"}
"""Packed weights, and the tables that a step comes with."""
RELEASED = {("expert_stream", "_outer_kernel"): ("_inner_kernel", {"tiles_ptr"})}
"""What one kernel besides may read, as the named one before it had waited for that when it released this one."""


def overlapping(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "OVERLAP" in parameters(node):
            yield node


def parameters(function):
    return [argument.arg for argument in function.args.args]


@cache
def helpers(path):
    """Functions of the package that those of a module can call, by name; each with those that it can call itself."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node, found
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("dovetail_cuda.kernels."):
            others = helpers(KERNELS / f"{node.module.rpartition('.')[2]}.py")
            found |= {alias.name: others[alias.name] for alias in node.names if alias.name in others}
    return found


def within(statements, *kinds):
    return [node for statement in statements for node in ast.walk(statement) if isinstance(node, kinds)]


def sources(node, pointers):
    """Pointers of a kernel that an expression comes from, by those that names come from."""
    return {pointer for name in within([node], ast.Name) for pointer in pointers.get(name.id, ())}


def assigned(statements, pointers):
    """What names come from where statements, in whatever order, may have assigned to them."""
    pointers, found = dict(pointers), within(statements, ast.Assign, ast.AugAssign, ast.AnnAssign)
    for node in found * len(found):  # as often as it can take to get from the first to the last
        for name in within(getattr(node, "targets", None) or [node.target], ast.Name):
            pointers[name.id] = pointers.get(name.id, set()) | sources(node.value, pointers)
    return pointers


def touched(statements, pointers, known):
    """How statements touch memory, in helpers too: the name of what does, and pointers that it does it by."""
    pointers = assigned(statements, pointers)
    for call in within(statements, ast.Call):
        name = ast.unparse(call.func)
        if name in known:
            helper, own = known[name]
            given = [*zip(parameters(helper), call.args, strict=False)]
            given += [(keyword.arg, keyword.value) for keyword in call.keywords]
            yield from touched(helper.body, {word: sources(value, pointers) for word, value in given}, own)
        elif any(word in name.rpartition(".")[2] for word in TOUCHES):
            yield name.rpartition(".")[2], sources(call.args[0], pointers)


def first(kernel, statement):
    """Where all programs come to a statement, if they do."""
    return next((i for i, node in enumerate(kernel.body) if ast.unparse(node) == statement), None)


def problems(kernel, known, allowed=frozenset(UNWRITTEN)):
    end = first(kernel, "wait(OVERLAP)")
    if end is None:
        return ["does not wait in every program"]
    given = [argument.arg for argument in kernel.args.args if is_pointer(argument)]
    found = [
        f"{name} before it waits"
        for name, pointers in touched(kernel.body[:end], {name: {name} for name in given}, known)
        if not (any(word in name for word in READS) and pointers and pointers <= allowed)
    ]
    if within(kernel.body[:end], ast.Return):
        found.append("returns before it waits")
    return found


def is_pointer(argument):
    return argument.arg.endswith("_ptr") or "tensor_descriptor" in ast.dump(argument)


PATHS = sorted(path for path in KERNELS.glob("*.py") if path.name != "overlap.py" and any(overlapping(path)))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_touches_nothing_before_it_waits(path):
    found = {}
    for kernel in overlapping(path):
        _, released = RELEASED.get((path.stem, kernel.name), ("", set()))
        found[kernel.name] = problems(kernel, helpers(path), UNWRITTEN | released)
    assert {name: reasons for name, reasons in found.items() if reasons} == {}


@pytest.mark.parametrize(("place", "before"), [(place, before) for place, (before, _) in RELEASED.items()])
def test_what_is_relied_on_was_waited_for(place, before):
    module, name = place
    kernels = {kernel.name: kernel for kernel in overlapping(KERNELS / f"{module}.py")}
    assert name in kernels
    assert first(kernels[before], "wait(OVERLAP)") < first(kernels[before], "release(OVERLAP)")


MODULE = """
from dovetail_cuda.kernels.segments import segment_of
def own(x, at):
 for i in range(x):
  at = at + i
  y = tl.load(at)
 return y
def outer(x, at): return own(x, at=at)
def kernel(
 p, x, x_ptr, table_ptr, positions_ptr, inputs: tma.tensor_descriptor, weights: tma.tensor_descriptor, OVERLAP
):
"""


@pytest.fixture
def found(tmp_path):
    def find(body):
        path = tmp_path / "kernel.py"
        path.write_text(f"{MODULE} {body}")
        return problems(*overlapping(path), helpers(path))

    return find


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("release(OVERLAP)\n x = tl.load(p)\n wait(OVERLAP)", "load before it waits"),
        ("release(OVERLAP)\n x = tl.load(x_ptr)\n wait(OVERLAP)", "load before it waits"),
        ("at = table_ptr + tl.load(x_ptr)\n x = tl.load(at)\n wait(OVERLAP)", "load before it waits"),
        ("x = own(x, x_ptr)\n wait(OVERLAP)", "load before it waits"),
        ("x = outer(x_ptr, table_ptr)\n y = outer(x, at=x_ptr)\n wait(OVERLAP)", "load before it waits"),
        ("x = segment_of(x, x_ptr, 1, 2, 3)\n wait(OVERLAP)", "load before it waits"),
        ("tma.async_load(inputs, x)\n wait(OVERLAP)", "async_load before it waits"),
        ("tl.store(table_ptr, 1)\n wait(OVERLAP)", "store before it waits"),
        ("if x:\n  wait(OVERLAP)\n tl.store(p, 1)", "does not wait in every program"),
        ("mbarrier.wait(OVERLAP)\n tl.store(p, 1)", "does not wait in every program"),
        ("if x:\n  return\n wait(OVERLAP)", "returns before it waits"),
    ],
)
def test_notices(body, problem, found):
    assert set(found(body)) == {problem}


@pytest.mark.parametrize(
    "body",
    [
        "at = table_ptr + tl.load(positions_ptr + x)\n x = tl.load(at + 1)\n wait(OVERLAP)",
        "x = outer(x, table_ptr) + segment_of(x, positions_ptr, 1, 2, 3)\n wait(OVERLAP)\n tl.store(x_ptr, x)",
        "copy(weights, x)\n wait(OVERLAP)\n copy(inputs, x)",
    ],
)
def test_lets_tables_and_weights_be_read(body, found):
    assert found(body) == []

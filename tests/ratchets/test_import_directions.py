"""Imports point one way, and what must be light never reaches torch; read from the source, nothing is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {path.name: path for src in (ROOT / "core/src", *ROOT.glob("plugins/*/src")) for path in src.iterdir()}
PACKAGES = sorted(
    name for name in SOURCES if name.startswith("dovetail") and SOURCES[name].is_dir() and "." not in name
)

TORCH_FREE = str.split(
    "errors env options config messages sampling_params hookspecs resolver resolution checkpoint "
    "plugins scheduler kv cli server "
    "engine.engine engine.client engine.tokenizer engine.chat_template engine.detokenizer engine.processor "
    "engine.outputs engine.llm contracts.executor"
)
HEAVY = {"torch", "transformers", "numpy"}


def modules(package):
    """Dotted name -> syntax tree, for every file of a package."""
    for path in sorted(SOURCES[package].rglob("*.py")):
        parts = path.relative_to(SOURCES[package].parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(node, *, everywhere):
    """Dotted names imported by a module: everywhere, or only when it is imported itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where they point"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif everywhere or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if not everywhere and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield from imports(child, everywhere=everywhere)


CORE = dict(modules("dovetail"))


def with_parents(name):
    """Importing ``a.b.c`` imports ``a`` and ``a.b`` as well."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def heavy_path(module):
    """How importing a module of the core reaches torch: the chain of names; None if it does not."""
    seen = {module}
    chains = [[name] for name in with_parents(module)]
    while chains:
        chain = chains.pop()
        for target in imports(CORE[chain[-1]], everywhere=False):
            if target.split(".")[0] in HEAVY:
                return [*chain, target]
            for name in with_parents(target):
                if name in CORE and name not in seen:
                    seen.add(name)
                    chains.append([*chain, name])
    return None


def test_the_six_distributions_are_seen():
    assert {
        "dovetail",
        "dovetail_models",
        "dovetail_cuda",
        "dovetail_tpu",
        "dovetail_quant",
        "dovetail_specdec",
    } <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_a_plugin_but_itself(package):
    foreign = [
        f"{name} imports {target}"
        for name, tree in modules(package)
        for target in imports(tree, everywhere=True)
        if target.startswith("dovetail_") and target.split(".")[0] != package
    ]
    assert foreign == []


def test_the_checker_finds_torch_where_it_is():
    assert heavy_path("dovetail.runner.slots") is not None
    assert heavy_path("dovetail.contracts.model") is not None


@pytest.mark.parametrize("part", TORCH_FREE)
def test_torch_free_part_does_not_reach_torch_at_import(part):
    prefix = f"dovetail.{part}"
    members = [name for name in CORE if name == prefix or name.startswith(prefix + ".")]
    assert members, f"{prefix} is gone; take it off the list"
    assert [" -> ".join(chain) for name in members if (chain := heavy_path(name))] == []


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "dovetail"])
def test_plugin_modules_are_light(package):
    trees = dict(modules(package))
    for name in (package, f"{package}.plugin"):
        assert [t for t in imports(trees[name], everywhere=False) if t.split(".")[0] in HEAVY] == []

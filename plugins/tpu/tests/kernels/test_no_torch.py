import ast
from pathlib import Path

import dovetail_tpu.kernels

ALLOWED = {"jax", "dovetail_tpu.kernels", "dovetail.errors"}
STANDARD = {"__future__", "collections", "dataclasses", "enum", "functools", "math", "types", "typing"}


def test_kernels_serve_every_bridge():
    """They import JAX, each other, and errors, but no torch, which differs between bridges."""
    paths = sorted(Path(dovetail_tpu.kernels.__file__).parent.glob("*.py"))
    assert len(paths) > 1
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                is_allowed = any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED)
                assert is_allowed or name.split(".")[0] in STANDARD, f"{path.name} imports {name}"

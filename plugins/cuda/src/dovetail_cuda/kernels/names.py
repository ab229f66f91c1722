"""Names of compiled kernels, which do not depend on what a process compiled before, and are found quickly.

Triton names a kernel by its source, its helpers' names, and the constants that it and they use. Up to release 3.6 it
counts a helper's constants only if it happens to have named that helper for another kernel already, so that a process
that comes to the kernels in another order, a later start or one that compiles for another, looks for other names.
Names also hold a hash of the whole compiler, hundreds of MB that every process would read first.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.runtime.jit import DependenciesFinder


def name_helpers_first() -> None:
    """From now on the constants of every helper count."""
    count = DependenciesFinder._update_hash

    def count_all(finder: Any, helper: Any) -> None:
        helper.cache_key  # noqa: B018  this finds its constants
        count(finder, helper)

    DependenciesFinder._update_hash = count_all


def know_the_compiler_by_its_files() -> None:
    """From now on names hold what :func:`files_key` says of Triton."""
    triton.runtime.cache.triton_key = lambda: files_key(Path(triton.__file__).parent)


@cache
def files_key(folder: Path) -> str:
    """Changes with the size and the time of any module in a folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.so")]):
        about = path.stat()
        digest.update(f"{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()

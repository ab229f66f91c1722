"""Names of compiled kernels that do not depend on what a process compiled before.

Triton names a kernel by its source, its helpers' names, and the constants that it and they use. Up to release 3.6 it
counts a helper's constants only if it happens to have named that helper for another kernel already, so that a process
that comes to the kernels in another order, a later start or one that compiles for another, looks for other names.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import DependenciesFinder


def name_helpers_first() -> None:
    """From now on the constants of every helper count."""
    count = DependenciesFinder._update_hash

    def count_all(finder: Any, helper: Any) -> None:
        helper.cache_key  # noqa: B018  this finds its constants
        count(finder, helper)

    DependenciesFinder._update_hash = count_all

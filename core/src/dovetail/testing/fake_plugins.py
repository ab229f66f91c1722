"""Plugins made up for a test: a module and the metadata of a distribution that declares it."""

from __future__ import annotations

import importlib
from pathlib import Path
from textwrap import dedent


def install(
    site: Path, plugin: str, source: str, *, distribution: str = "", version: str = "1.0", target: str = ""
) -> str:
    """Make a plugin discoverable, as if it were installed with pip. Nothing is imported.

    Args:
        site: a folder on ``sys.path``.
        plugin: its entry-point name.
        source: the plugin module's code; common indentation is removed.
        distribution: the default is ``"dist-" + plugin``.
        target: what the entry point names; by default the module.

    Returns:
        The module's name.
    """
    distribution = distribution or f"dist-{plugin}"
    module = f"fake_{plugin}_{distribution}".replace("-", "_")
    (site / f"{module}.py").write_text(dedent(source))
    metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[dovetail]\n{plugin} = {target or module}\n")
    importlib.invalidate_caches()
    return module

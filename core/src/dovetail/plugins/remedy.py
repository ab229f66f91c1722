"""What to do about a plugin's exception, as far as the exception tells."""

from __future__ import annotations

import re

from dovetail import __version__
from dovetail.plugins.requirements import pip_install, unmet_by


def one_line(error: BaseException) -> str:
    """Type and text of an exception, on one line and with a full stop."""
    text = " ".join(line.strip() for line in str(error).splitlines()).strip()
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def for_exception(error: BaseException, distribution: str, module: str) -> str:
    """One sentence.

    Args:
        distribution: whose code raised it.
        module: of that distribution, the one that was imported or ran.
    """
    if isinstance(error, ImportError):
        return _for_import(error, distribution, module)
    if isinstance(error, TypeError) and re.search(r"Manifest\.__init__\(\) got an unexpected keyword", str(error)):
        return (
            f"dovetail-core {__version__} does not know that field of the manifest: upgrade it, install an older "
            f"release of {distribution}, or correct the field's name."
        )
    return f"Install a release of {distribution} that repairs this, or report it to its authors."


def _for_import(error: ImportError, distribution: str, module: str) -> str:
    missing = unmet_by(distribution)
    if missing:
        return f"Install what {distribution} depends on: {pip_install(missing)}."
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent is None or absent.partition(".")[0] == module.partition(".")[0]:
        return f"Its installation is damaged or does not fit what it imports; run: {reinstall(distribution)}."
    return (
        f"Install the distribution that brings module {absent!r}; {distribution} does not declare it as a dependency, "
        "so report that to its authors."
    )


def reinstall(distribution: str) -> str:
    """The command that repairs an installation."""
    return f"pip install --force-reinstall {distribution}"

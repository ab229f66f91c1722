"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import CommandManifest


@hookimpl
def dovetail_register_commands(register: Callable[[CommandManifest, str], None]) -> None:
    """Called once, when plugins are discovered."""
    manifest = CommandManifest(name="sketch", summary="Ask a running server whether it is well.")
    register(manifest, "dovetail_sketch.command:command")

"""The conformance suite of plugins as such: that commands find them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import msgspec

from dovetail.plugins.registry import PluginStatus
from dovetail.testing.conformance.suite import Suite


class PluginSuite(Suite):
    """Holds a plugin to what every command asks of it: that it loads where nothing heavy is loaded yet.

    A process that runs tests cannot tell: torch is there already, so that a plugin module may import it unnoticed.

    Attributes:
        plugin: the entry-point name; takes the place of a subject.
    """

    contract: ClassVar[str] = "plugin"
    kind: ClassVar[str] = "plugins"
    plugin: ClassVar[str]

    def test_discovery(self) -> None:
        """plugin.1: a fresh process, as each command is one, finds it and loads it."""
        found = {status.name: status for status in self._discovered()}
        self.check(self.plugin in found, f"no plugin {self.plugin!r} is installed, but {', '.join(found)}.")
        status = found[self.plugin]
        well = status.state == "loaded"
        self.check(well, f"for commands, the {status.owner} is {status.state}. {status.failure}".rstrip())

    def _discovered(self) -> tuple[PluginStatus, ...]:
        """What became of each plugin in a process of its own, which looks for modules where this one does."""
        done = subprocess.run(
            [sys.executable, "-m", "dovetail", "plugins", "--json"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            check=False,
        )
        self.check(done.returncode == 0, f"`dovetail plugins` fails: {done.stderr.decode(errors='replace').strip()}")
        return msgspec.json.decode(done.stdout, type=dict[str, tuple[PluginStatus, ...]])["plugins"]

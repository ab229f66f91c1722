"""The process's surroundings: interpreter, variables, folders, limits."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dovetail import env
from dovetail.cli.doctor.finding import Finding, ok, problem, warning
from dovetail.cli.doctor.subject import Subject
from dovetail.plugins.registry import nearest
from dovetail.sizes import GIB, MIB, size

ENOUGH_FILES = 4096
"""Open files that a busy server needs: one per connection, and some."""
ENOUGH_TEMPORARY = 64 * MIB
ENOUGH_CACHE = 2 * GIB


def python(subject: Subject) -> Iterator[Finding]:
    """The interpreter's version against what the core asks for."""
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), metadata.metadata("dovetail-core")["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield ok(f"{version} ({platform.python_implementation()}, {platform.system()} {platform.machine()})")
    else:
        yield problem(f"{version}, and dovetail-core needs {wanted}", "Install it into another interpreter.")


def variables(subject: Subject) -> Iterator[Finding]:
    """Every variable that begins like ours is ours, and has a value that can be read."""
    known = re.findall(r"^``(DOVETAIL_\w+)``", env.__doc__ or "", re.MULTILINE)
    given = sorted(name for name in os.environ if name.startswith("DOVETAIL_"))
    for name in given:
        if name not in known:
            yield warning(f"{name} is set, and nothing reads it.{nearest(name, known)}", "Correct or unset it.")
    env.switch("DOVETAIL_TRACE_HOOKS")
    yield ok(", ".join(name for name in given if name in known) or "none set")


def temporary(subject: Subject) -> Iterator[Finding]:
    """The folder for sockets."""
    from dovetail.engine import socket_folder

    folder = socket_folder.root()
    with tempfile.TemporaryDirectory(prefix=socket_folder.PREFIX, dir=folder):
        pass
    free = shutil.disk_usage(folder).free
    if free < ENOUGH_TEMPORARY:
        yield warning(f"{folder} has {size(free)} left", "Free some, or set TMPDIR to another folder.")
    else:
        yield ok(f"{folder}, writable, {size(free)} free")


def limits(subject: Subject) -> Iterator[Finding]:
    """What the operating system lets a process have."""
    import resource

    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < ENOUGH_FILES:
        yield warning(
            f"{files} open files per process, and every connection takes one",
            f"Raise it: `ulimit -n {ENOUGH_FILES}`, or LimitNOFILE= in a systemd unit (the hard limit is {most}).",
        )
    else:
        yield ok(f"{'any number of' if files == resource.RLIM_INFINITY else files} open files")
    for name, what in (("RLIMIT_AS", "address space"), ("RLIMIT_DATA", "data")):
        most, _ = resource.getrlimit(getattr(resource, name))
        if most != resource.RLIM_INFINITY:
            yield warning(f"{what} is limited to {size(most)}", "Weights are mapped: lift it (`ulimit`).")


def downloads(subject: Subject) -> Iterator[Finding]:
    """The folder that hub models go to, if there is one to download."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield warning(f"{there} is not writable", "Set HF_HOME to a folder that is, or name local checkpoints.")
    elif free < ENOUGH_CACHE:
        yield warning(f"{folder} has {size(free)} left", "Free some, or set HF_HOME to a larger disk.")
    else:
        yield ok(f"{folder}, {size(free)} free")

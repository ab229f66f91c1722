"""Room for programs that execute on the host. Its compiler gives each kernel of a program three memory maps, of which
Linux lets a process have so many, and dies when it gets no more: an interpreted kernel of Pallas takes 300.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from dovetail.errors import ConfigError

MAPS = Path("/proc/self/maps")
MOST = Path("/proc/sys/vm/max_map_count")
SHARE = 0.75
"""Of what a process may have, from which on nothing more is compiled: one program takes some thousands."""
_one = Lock()


@contextmanager
def room() -> Iterator[None]:
    """Compile inside. Threads do it one after the other, so that each sees what all before it have taken; the compiler
    has threads of its own.

    Raises:
        ConfigError: there may be too few maps left.
    """
    with _one:
        _check()
        yield


def _check() -> None:
    if not MAPS.exists() or not MOST.exists():
        return
    with MAPS.open("rb") as file:
        count = sum(1 for _ in file)
    most = int(MOST.read_text())
    if count > SHARE * most:
        raise ConfigError(
            f"Programs that execute on the host have taken {count} memory maps of this process, which may have {most}. "
            "Choose --attention tpu-gather, which takes fewer, lower --max-num-batched-tokens, or raise the limit: "
            f"sysctl -w vm.max_map_count={4 * most}."
        )

"""Every deprecation, in one place: what it is, what to use instead, since when, and in which version it goes.

Whoever deprecates something adds it to :data:`LEDGER`; what warns of it takes its words from here. A test fails as
soon as the version has come in which an entry should be gone. ``docs/plugins/stability.md`` says what is promised.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Deprecation(msgspec.Struct, frozen=True, kw_only=True):
    """Something that goes.

    Attributes:
        what: in words, as :func:`contract` and :func:`hook` spell it, or free for anything else.
        instead: what to use.
        since: the core version that deprecated it.
        removed_in: the core version that no longer has it.
    """

    what: str
    instead: str
    since: str
    removed_in: str

    def __str__(self) -> str:
        return (
            f"{self.what} is deprecated since {self.since} and goes in {self.removed_in}; {self.instead} instead."
        )


LEDGER: tuple[Deprecation, ...] = ()
"""Nothing is deprecated at present."""


def contract(name: str, version: int) -> str:
    """How the ledger spells an old version of a contract."""
    return f"version {version} of the {name} contract"


def hook(name: str) -> str:
    """How the ledger spells a hook."""
    return f"hook {name}"


def notice(what: str) -> str:
    """The ledger's words about ``what``; empty if it is not deprecated."""
    return next((str(entry) for entry in LEDGER if entry.what == what), "")


def overdue(version: str, ledger: Sequence[Deprecation] | None = None) -> list[Deprecation]:
    """What ``version`` of the core should no longer have."""
    from packaging.version import Version  # plugin discovery imports this module and needs none of it

    now = Version(version)
    return [entry for entry in (LEDGER if ledger is None else ledger) if Version(entry.removed_in) <= now]

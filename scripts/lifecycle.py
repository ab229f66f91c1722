"""The lifecycle of a plugin, drawn from the docstrings of its contract.

Every abstract method of a contract says when it runs, and so does each with a default that a plugin may replace:
``Phase: load. Order: 3. Times: once per layer. May raise: ConfigError.``
Phases follow each other, methods within a phase follow their order, and a test compares both with what really happens.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

PHASES = {
    "resolve": "resolution, which `dovetail explain` does in its own process",
    "load": "loading",
    "warm-up": "warm-up",
    "step": "every step",
    "end": "shutdown",
}
"""Phases in their order, in words."""
_FACTS = re.compile(r"Phase: ([\w-]+)\.\s+Order: (\d+)\.\s+Times: ([^.]+)\.\s+May raise: ([^.]+)\.")
START, END = "<!-- lifecycle: written by scripts/make_docs.py from the contract's docstrings -->", "<!-- /lifecycle -->"


class Call(NamedTuple):
    """One method: when it runs, how often, and what it may raise."""

    phase: str
    order: int
    method: str
    times: str
    raises: str


def calls(contract: type) -> list[Call]:
    """The methods of a contract in the order in which they run.

    Raises:
        AssertionError: a method does not say when it runs, or in a phase that does not exist.
    """
    found = []
    abstract = getattr(contract, "__abstractmethods__", frozenset())
    for name in sorted({*abstract, *vars(contract)}):
        text = " ".join((inspect.getdoc(inspect.getattr_static(contract, name)) or "").split())
        facts = _FACTS.search(text)
        if not facts and name not in abstract:
            continue
        assert facts, f"{contract.__name__}.{name} does not say `Phase: … Order: … Times: … May raise: …`"
        phase, order, times, raises = facts.groups()
        assert phase in PHASES, f"{contract.__name__}.{name} runs in the unknown phase {phase!r}"
        found.append(Call(phase, int(order), name, " ".join(times.split()), " ".join(raises.split())))
    return sorted(found, key=lambda call: (list(PHASES).index(call.phase), call.order))


def picture(contract: type, hook: str | None) -> str:
    """A sequence diagram in Mermaid's language; ``hook`` is what registers implementations."""
    lines = ["sequenceDiagram", "    participant C as command", "    participant E as engine process"]
    lines.append(f"    participant P as your {contract.__name__}")
    if hook is not None:
        lines += ["    Note over C: discovery, before torch is imported", f"    C->>P: {hook}(register)"]
    lines.append("    C->>E: options, and every registration")
    phase = ""
    for call in calls(contract):
        if call.phase != phase:
            lines += ["    end"] if phase == "step" else []
            lines.append(f"    {'loop' if call.phase == 'step' else 'Note over E:'} {PHASES[call.phase]}")
            phase = call.phase
        raises = "" if call.raises == "nothing" else f", may raise {call.raises}"
        lines.append(f"    E->>P: {call.method} ({call.times}{raises})")
    lines += ["    end"] if phase == "step" else []
    return "\n".join(["```mermaid", *lines, "```"])


def fill(page: str, contract: type, hook: str | None) -> str:
    """``page`` with the picture between its markers.

    Raises:
        AssertionError: the page has no markers.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    assert start, "the page has no place for the lifecycle"
    assert end, "the place for the lifecycle has no end"
    return f"{before}{START}\n{picture(contract, hook)}\n{END}{after}"

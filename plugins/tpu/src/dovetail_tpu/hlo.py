"""What a compiled program does, read from its text in XLA's language (HLO) after all passes.

The compiler's figures do not say everything: it may alias a cache and copy all of it nevertheless, to keep it in
another order in between.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
IN_PLACE = frozenset({"parameter", "bitcast", "custom-call", "get-tuple-element", "conditional", "opt-barrier"})
"""Instructions whose result is an array that is there already; of custom calls, the kernels that write caches."""


def collectives(text: str) -> Counter[str]:
    """How often chips exchange something, by kind; a kind that does not occur counts 0."""
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return Counter({kind: found.count(kind) for kind in COLLECTIVES if kind in found})


def copies(text: str, shape: Sequence[int]) -> list[str]:
    """Kinds of instructions that make another array of this shape."""
    size = _array(shape)
    made = re.findall(rf"^ *(?:ROOT )?%\S+ = {size}\S* ([\w-]+)\(", text, re.MULTILINE)
    started = ["copy-start"] * len(re.findall(rf" = \({size}.* copy-start\(", text))
    return [kind for kind in made if kind not in IN_PLACE] + started


def orders(text: str, shape: Sequence[int]) -> set[str]:
    """Orders of dimensions, fastest first, in which the program takes arrays of this shape."""
    (entry,) = re.findall(r"entry_computation_layout=\{(.*)", text)
    taken, _, _ = entry.partition(")->")
    return set(re.findall(_array(shape) + r"\{([\d,]+)", taken))


def has_doubles(text: str) -> bool:
    """Whether it computes in float64, which chips emulate, slowly."""
    return "f64[" in text


def _array(shape: Sequence[int]) -> str:
    return rf"\w+\[{','.join(map(str, shape))}\]"

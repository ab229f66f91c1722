"""What compilers and runtimes of the chips refuse, as errors that say what to change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dovetail.errors import ConfigError, DovetailError
from dovetail_tpu.kernels.chip import chip_of_kind

WANTS = ("resource_exhausted", "out of memory", "that was not possible")
"""What faults say where there is too little memory; torch_xla leaves the code of a fault out."""
LACKS = (*WANTS, "exceed")
"""And where there is too little of one of the small ones; other faults, too, may name one."""

_logger = logging.getLogger("dovetail.tpu")


@contextmanager
def explained(kind: str, what: str) -> Iterator[None]:
    """Explain want of memory. Other faults stay as they are.

    Args:
        kind: JAX's ``device_kind``.
        what: is being done memory for.

    Raises:
        ConfigError: memory does not suffice.
    """
    try:
        yield
    except Exception as error:  # JAX's and torch_xla's are RuntimeErrors; those that Pallas makes of JAX's are not
        if isinstance(error, DovetailError) or not _says(str(error), WANTS):
            raise
        raise refused(str(error), _chip(kind), what) from error


@contextmanager
def compiling(kind: str, what: str) -> Iterator[None]:
    """Explain whatever a compiler refuses. Nothing else belongs inside: faults of our own code would look like its own.

    Args:
        kind: JAX's ``device_kind``.
        what: is being compiled.

    Raises:
        ConfigError: it does not compile; says what to change.
    """
    try:
        yield
    except Exception as error:  # kernels' compilers raise what they like
        if isinstance(error, DovetailError):
            raise
        _logger.debug("%s does not compile:", what, exc_info=True)  # the engine's process tells the message alone
        raise refused(str(error) or type(error).__name__, _chip(kind), what) from error


def program_of(function: Callable[..., Any], static: Mapping[str, Any]) -> str:
    """What compiling a function of JAX is called; ``static`` are its named arguments."""
    return f"The program of {static.get('kernel', function).__name__.strip('_')}"


def refused(fault: str, chip: str, what: str = "A step") -> ConfigError:
    """What a refusal means to those who chose the options."""
    first = fault.splitlines()[0]
    lacks = _says(fault, LACKS)
    kind = next((kind for kind in ("hbm", "vmem", "smem") if lacks and kind in fault.lower()), "")
    if kind == "hbm" or (not kind and _says(fault, WANTS)):
        return ConfigError(
            f"{what} does not fit into the memory of {chip}. Lower --max-num-batched-tokens, --max-num-seqs or "
            f"--kv-cache-memory, quantize the weights, or take more chips. ({first})"
        )
    if kind == "vmem":
        return ConfigError(
            f"A kernel needs more of a core's own memory (vmem) than {chip} has. Lower --block-size, "
            f"--max-num-batched-tokens or --max-num-seqs, or split heads among more chips. ({first})"
        )
    if kind == "smem":
        return ConfigError(
            f"A step's tables need more of a core's scalar memory (smem) than {chip} has. Raise --block-size, or lower "
            f"--max-model-len or --max-num-seqs. ({first})"
        )
    return ConfigError(
        f"{what} does not compile for {chip}: report it to the authors of dovetail-tpu. Where attention's kernel is at "
        f"fault, --attention tpu-gather does without it. ({first})"
    )


def _says(fault: str, signs: Sequence[str]) -> bool:
    return any(sign in fault.lower() for sign in signs)


def _chip(kind: str) -> str:
    chip = chip_of_kind(kind)
    return chip.name if chip else kind

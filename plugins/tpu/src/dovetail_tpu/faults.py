"""What compilers and runtimes of the chips refuse, as errors that say what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dovetail.errors import ConfigError, DovetailError
from dovetail_tpu.kernels.chip import chip_of_kind

EXHAUSTED = "RESOURCE_EXHAUSTED"
LACKS = (EXHAUSTED.lower(), "out of memory", "exceed")
"""What faults say where there is too little of a memory; others, too, may name one."""


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
        if isinstance(error, DovetailError) or EXHAUSTED not in str(error):
            raise
        chip = chip_of_kind(kind)
        raise refused(str(error), chip.name if chip else kind, what) from error


def refused(fault: str, chip: str, what: str = "A step") -> ConfigError:
    """What a refusal means to those who chose the options."""
    first = fault.splitlines()[0]
    said = fault.lower()
    lacks = any(sign in said for sign in LACKS)
    kind = next((kind for kind in ("hbm", "vmem", "smem") if lacks and kind in said), "")
    if kind == "hbm" or (not kind and EXHAUSTED in fault):
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
    return ConfigError(f"The compiler of {chip} refuses a step: report it to the authors of dovetail-tpu. ({first})")

"""The native kernels: plain C, compiled at installation, one library per instruction set, called through ctypes.

They run on their own pool of threads; see ``native/parallel.h``. A call holds no Python lock, so other threads of the
process go on.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dovetail.errors import ConfigError
from dovetail.platforms.cpu import machine

FOLDER = Path(__file__).parent / "native"

PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "dovetail_set_threads": (c_int, (c_int,)),
    "dovetail_norm": (
        None,
        (c_int, c_int, c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float),
    ),
    "dovetail_rotary": (
        None,
        (c_int, c_void_p, c_long, c_int, c_void_p, c_long, c_int, c_int, c_void_p, c_void_p, c_int, c_long),
    ),
    "dovetail_silu_and_mul": (None, (c_int, c_void_p, c_void_p, c_long, c_long)),
    "dovetail_gelu_tanh_and_mul": (None, (c_int, c_void_p, c_void_p, c_long, c_long)),
    "dovetail_packed_bytes": (c_long, (c_int, c_long, c_long)),
    "dovetail_pack": (None, (c_int, c_void_p, c_void_p, c_long, c_long)),
    "dovetail_linear": (
        None,
        (c_int, c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long),
    ),
    "dovetail_linear8": (
        None,
        (
            *(c_int, c_int, c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
            *(c_long, c_long, c_long, c_long),
        ),
    ),
    "dovetail_linear_int8": (
        None,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long),
    ),
    "dovetail_quantize": (
        None,
        (c_int, c_int, c_void_p, c_long, c_void_p, c_void_p, c_long, c_long, c_long),
    ),
    "dovetail_experts": (None, (c_int, *(c_void_p,) * 10, *(c_long,) * 5)),
    "dovetail_gather": (c_int, (c_int, c_void_p, c_long, c_void_p, c_void_p, c_long, c_long)),
    "dovetail_argmax": (None, (c_int, c_void_p, c_long, c_void_p, c_long, c_long)),
    "dovetail_attention": (
        c_int,
        (
            *(c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p, c_long, c_void_p, c_long, c_void_p),
            *(c_float, c_long, c_float),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """A loaded library.

    Attributes:
        isa: the instruction set that it was built for.
        library: its functions, prototypes set.
    """

    isa: str
    library: ctypes.CDLL

    def set_threads(self, count: int) -> int:
        """Run on ``count`` threads, the caller included.

        Returns:
            How many there are: fewer if the operating system refuses to start them.
        """
        return int(self.library.dovetail_set_threads(count))


def built_isas() -> list[str]:
    """Instruction sets that this installation has kernels for and this CPU can run, best first."""
    return [isa for isa in machine.supported_isas() if _path(isa).exists()]


def _path(isa: str) -> Path:
    return FOLDER / f"kernels-{isa}.so"


def missing_reason() -> str:
    """Why there are no native kernels here, and what to do; empty when there are."""
    if built_isas():
        return ""
    if not machine.supported_isas():
        return (
            f"This CPU ({machine.cpu_name()}) lacks AVX2 and FMA, which the native kernels need; "
            "choose --attention reference."
        )
    return (
        f"The native kernels for {', '.join(machine.supported_isas())} are missing from {FOLDER}; "
        "reinstall with `pip install --force-reinstall --no-deps dovetail-core`, or choose --attention reference."
    )


@lru_cache(maxsize=1)
def load() -> Kernels:
    """The best library for this CPU.

    Raises:
        ConfigError: there is none; the message says why and what to do.
    """
    reason = missing_reason()
    if reason:
        raise ConfigError(reason)
    return load_isa(built_isas()[0])


def load_isa(isa: str) -> Kernels:
    """The library of one instruction set, which the CPU must have."""
    library = ctypes.CDLL(str(_path(isa)))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return Kernels(isa, library)

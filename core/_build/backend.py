"""PEP 517 backend: setuptools, plus the compilation of the CPU platform's kernels.

The kernels are one plain C library per instruction set, loaded through ctypes, so they need no Python headers and
serve every Python version. A machine without a working C compiler gets one from PyPI (``ziglang``) for the build.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

SOURCES = Path(__file__).parent.parent / "src" / "dovetail" / "platforms" / "cpu" / "native"
COMPILER_FROM_PYPI = "ziglang>=0.13"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-pthread")
X86_VARIANTS = {
    "x86_64_v3": ("x86-64-v3", ()),
    "x86_64_v4": ("x86-64-v4", ()),
    "x86_64_v4_bf16": ("x86-64-v4", ("-mavx512bf16", "-mavx512vnni")),
}


def variants() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Instruction sets to build for: ``-march`` and further flags by the name that the loader looks for."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_VARIANTS
    return {platform.machine().lower(): ("", ())}


def command(compiler: list[str], march: str, extra: tuple[str, ...]) -> list[str]:
    """The compiler call up to its inputs."""
    if "ziglang" in compiler:
        march = march.replace("-", "_")
    return [*compiler, *FLAGS, *([f"-march={march}"] if march else []), *extra]


def works(compiler: list[str]) -> bool:
    """Whether the compiler has the headers and knows the newest instruction set that is built."""
    march, extra = list(variants().values())[-1]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.c"
        probe.write_text("#include <math.h>\n#include <stdlib.h>\nfloat f(float x) { return sqrtf(x); }\n")
        call = [*command(compiler, march, extra), str(probe), "-o", str(Path(folder) / "probe.so"), "-lm"]
        return subprocess.run(call, capture_output=True, check=False).returncode == 0


def system_compiler() -> list[str] | None:
    """The first working compiler of this machine; ``CC`` goes first."""
    candidates = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else []
    candidates += [[found] for name in ("cc", "gcc", "clang") if (found := shutil.which(name))]
    return next((candidate for candidate in candidates if works(candidate)), None)


def compile_kernels() -> None:
    """Build one library per instruction set beside its sources.

    Raises:
        RuntimeError: no compiler works, or the sources do not compile; with the compiler's words.
    """
    compiler = system_compiler() or [sys.executable, "-m", "ziglang", "cc"]
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    with tempfile.TemporaryDirectory() as cache:
        environment = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache, **os.environ}
        for name, (march, extra) in variants().items():
            built = Path(cache) / f"kernels-{name}.so"
            call = [*command(compiler, march, extra), *sources, "-o", str(built), "-lm"]
            run = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
            if run.returncode:
                raise RuntimeError(f"Compiling the CPU kernels failed: {shlex.join(call)}\n{run.stderr}")
            # Renamed into place: a running engine keeps the library that it has loaded.
            staged = SOURCES / f"{built.name}.new"
            shutil.copy(built, staged)
            staged.replace(SOURCES / built.name)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Setuptools' needs, and a compiler where there is none."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Setuptools' needs, and a compiler where there is none."""
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler_requirement()


def _compiler_requirement() -> list[str]:
    return [] if system_compiler() else [COMPILER_FROM_PYPI]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Compile, then build the wheel."""
    compile_kernels()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Compile into the source tree, then build the editable wheel."""
    compile_kernels()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)

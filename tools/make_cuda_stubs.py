"""Lets PyPI's build of torch import where CUDA's libraries are missing: ``make_cuda_stubs.py SITE_PACKAGES``.

torch_xla 2.9 needs the torch 2.9 of PyPI, which is linked to 13 libraries of CUDA: 2.6 GB, to run on a CPU. This puts
libraries with the same names and symbols beside torch, so that the dynamic linker is content; every function in them
returns an error. For tests on machines without a GPU. It is not part of any package: elsewhere, install the real ones.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

USERS = ("libc10_cuda", "libtorch_cpu", "libtorch_cuda", "libtorch_cuda_linalg", "libtorch_nvshmem", "libtorch_python")
LIBRARY = re.compile(r"NEEDED.*\[(lib(?:cu|nccl|nvshmem_host).*)\]")
PREFIXES = "__cuda|cuda|cuFile|cublas|cudnn|cufft|cupti|curand|cusolver|cusparse|nccl|nvshmem"
SYMBOL = re.compile(rf"\s[Uw] ((?:{PREFIXES})\w*)(?:@+(\S+))?$", re.MULTILINE)
UNVERSIONED = "libcudart.so.12"
"""Takes symbols without a version: every user of such a symbol loads this library."""
VERSIONS = {"": UNVERSIONED, "NVSHMEM": "libnvshmem_host.so.3"}
"""Which library a version belongs to, where the two are not called alike."""
ERROR = 999  # cudaErrorUnknown


def main() -> None:
    folder = Path(sys.argv[1]) / "torch" / "lib"
    users = [folder / f"{name}.so" for name in USERS]
    symbols: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, version in _matches(SYMBOL, ["nm", "-D", "--undefined-only"], users):
        symbols[VERSIONS.get(version, version)][version].add(name)
    for library in sorted(set(_matches(LIBRARY, ["readelf", "-d"], users))):
        _build(folder / library, symbols[library])
        sys.stdout.write(f"{folder / library}: {sum(map(len, symbols[library].values()))} symbols\n")


def _matches(pattern: re.Pattern[str], command: list[str], files: Iterable[Path]) -> Iterable[str]:
    for file in files:
        listing = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout
        yield from pattern.findall(listing)


def _build(library: Path, symbols: Mapping[str, Iterable[str]]) -> None:
    """Compile a library that exports ``symbols``, by version."""
    names = sorted({name for versioned in symbols.values() for name in versioned})
    versions = [f"{version} {{ global: {'; '.join(sorted(of))}; }};\n" for version, of in symbols.items() if version]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "stubs.c", Path(folder) / "versions"
        source.write_text("".join(f"int {name}(void) {{ return {ERROR}; }}\n" for name in names))
        script.write_text("".join(versions))
        scripts = [f"-Wl,--version-script={script}"] if versions else []
        options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}"]
        subprocess.run(["gcc", *options, *scripts, "-o", str(library), str(source)], check=True)


if __name__ == "__main__":
    main()

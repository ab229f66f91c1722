"""Compiled kernels that outlive the process: where Triton keeps them, and which engines have found all of theirs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dovetail.errors import ConfigError

_SOURCES = Path(__file__).parent


class KernelCache:
    """A folder of one chip and the versions that compile for it. What a kernel is compiled from names its files there.

    Attributes:
        folder: of the kernels.
        is_complete: an engine of the same workload met every step size before, so that nothing is left to compile.
    """

    def __init__(self, cache: Path, capability: tuple[int, int], workload: str) -> None:
        """Make Triton use the folder.

        Args:
            cache: shared with other platforms.
            capability: of the device.
            workload: names what will run.

        Raises:
            ConfigError: the folder cannot be made.
        """
        import triton  # not a dependency: torch brings it where there is CUDA

        chip = "".join(map(str, capability))
        folder = cache / "cuda" / f"torch-{torch.__version__}-triton-{triton.__version__}-sm{chip}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--compile-cache {cache} cannot be used: {error}. Name a folder to write to.") from error
        triton.knobs.cache.dir = str(folder)
        self.folder = folder
        self._mark = folder / f"complete-{_digest(workload)}"
        self.is_complete = self._mark.exists()

    def complete(self) -> None:
        """Every step size has been met: for the starts to come."""
        if self._mark.parent.is_dir():
            self._mark.touch()


def _digest(workload: str) -> str:
    """Of a workload, and of this plugin's sources: they decide which kernels there are."""
    digest = hashlib.sha256(workload.encode())
    for source in sorted(_SOURCES.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]

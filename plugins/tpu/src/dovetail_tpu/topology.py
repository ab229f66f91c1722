"""Devices that are not there, as the chips' own compiler knows them, which is in libtpu and runs on any host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from jax.experimental import topologies

from dovetail.errors import ConfigError
from dovetail_tpu.slices import Slice

_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Without these, libtpu lets one process at a time load it, and asks a server which chips the host has."""


def topology_devices(target: Slice) -> Sequence[Any]:
    """The devices of a slice.

    Raises:
        ConfigError: libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise ConfigError("The chips' compiler is not installed: pip install 'dovetail-tpu[aot]'.")
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    devices: Sequence[Any] = topologies.get_topology_desc(f"{target.chip.name}:{target.topology}", "tpu").devices
    return devices

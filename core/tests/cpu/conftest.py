"""Every instruction set that this CPU has runs every kernel test."""

import pytest
import torch

from dovetail.platforms.cpu import kernels
from dovetail.platforms.cpu.kernels import Kernels


@pytest.fixture(params=kernels.built_isas())
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels of one instruction set, which the attention backend also gets."""
    loaded = kernels.load_isa(request.param)
    monkeypatch.setattr(kernels, "load", lambda: loaded)
    return loaded


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both storage types."""
    return request.param

"""What the platform decides before there is a GPU."""

import pytest
import torch

from dovetail.contracts.platform import PlatformConfig
from dovetail.errors import ConfigError
from dovetail_cuda import platform
from dovetail_cuda.platform import CudaPlatform


@pytest.fixture
def driver(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia"
    monkeypatch.setattr(platform, "DRIVER", folder)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return folder


def test_a_build_of_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    probe = CudaPlatform.probe()
    assert not probe.available
    assert torch.__version__ in probe.reason
    assert "install" in probe.reason


def test_without_a_driver_the_reason_says_what_to_install(driver):
    assert "driver" in CudaPlatform.probe().reason
    driver.mkdir()
    assert "CUDA_VISIBLE_DEVICES" in CudaPlatform.probe().reason


def test_facts_come_from_the_drivers_files(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("0", "1"):
        (driver / "gpus" / name).mkdir(parents=True)
        (driver / "gpus" / name / "information").write_text(f"Model: \t\t Chip {name}\nIRQ: 5\n")
    (driver / "version").write_text("NVRM version: Open Kernel Module for x86_64  580.159.04\nGCC version: 12\n")
    probe = CudaPlatform.probe()
    assert probe.available
    assert probe.facts == {"devices": "2", "CUDA": "13.0", "chips": "Chip 0, Chip 1", "driver": "580.159.04"}
    assert not torch.cuda.is_initialized()


def test_default_dtype_is_the_checkpoints():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert CudaPlatform.default_dtype(dtype) == dtype
    assert CudaPlatform.default_dtype(torch.float64) == torch.float32


def test_options_are_refused_before_the_device_is_touched():
    with pytest.raises(ConfigError, match="--num-threads is 0"):
        CudaPlatform(PlatformConfig(num_threads=0))
    assert not torch.cuda.is_initialized()

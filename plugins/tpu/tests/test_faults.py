"""What those who chose the options are told when something does not fit."""

import re

import jax
import pytest
import torch
from jax.experimental import pallas as pl

from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail.errors import ConfigError
from dovetail_tpu.bridges.jax_bridge import JaxBridge
from dovetail_tpu.faults import explained, refused
from dovetail_tpu.platform import TpuPlatform

LACKS_HBM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 32G of 15.75G hbm.\nand more"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (LACKS_HBM, r"A step does not fit into the memory of v5e\..*take more chips"),
        ("RESOURCE_EXHAUSTED: Attempting to allocate 2G. That was not possible.", "A step does not fit into"),
        ("Attempting to allocate 2G. That was not possible.", "A step does not fit into"),  # as torch_xla says it
        ("Ran out of memory in memory space vmem. It should not be possible", r"\(vmem\).*Lower --block-size"),
        ("RESOURCE_EXHAUSTED: Mosaic failed to compile: scoped smem exceeded", r"\(smem\).*Raise --block-size"),
        ("INTERNAL: bitcast of unknown kind", "report it to the authors of dovetail-tpu"),
        ("INTERNAL: no strided load\n%1 = load(%0) : memref<8xbf16, memory_space<vmem>>", "report it to the authors"),
        ("Can only load scalars from SMEM", "report it to the authors of dovetail-tpu"),
    ],
)
def test_refusals_say_what_to_change(fault, says):
    with pytest.raises(ConfigError, match=rf"{says}.*\({re.escape(fault.splitlines()[0])}\)$"):
        raise refused(fault, "v5e")


@pytest.fixture
def platform(monkeypatch):
    platform = TpuPlatform(PlatformConfig())
    monkeypatch.setattr(platform._bridge, "device_kind", "TPU v6 lite")
    return platform


class OfMosaic(Exception):  # noqa: N818
    """Pallas turns JAX's errors into its own where it knows the line, which are no RuntimeErrors."""


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, OfMosaic])
@pytest.mark.parametrize("compiles", ["trace", "compile"])
def test_a_step_that_does_not_fit_is_refused_with_a_remedy(platform, monkeypatch, compiles, error):
    """The bridge torch_xla compiles what it traces."""
    monkeypatch.setattr(JaxBridge, compiles, fail(LACKS_HBM, error))
    program = platform.compile(lambda x: (x,), Bucket(16, 1))
    with pytest.raises(
        ConfigError,
        match=r"A step of 16 tokens × 1 requests does not fit into the memory of v6e\. Lower --max-num-batched",
    ):
        program(torch.zeros(16))


def for_chips(x_N):
    """A kernel that the host's compiler refuses."""
    return (pl.pallas_call(copied, out_shape=jax.ShapeDtypeStruct(x_N.shape, x_N.dtype))(x_N),)


def copied(x_ref, out_ref):
    out_ref[...] = x_ref[...]


def test_a_step_that_does_not_compile_is_refused_with_a_remedy(platform):
    program = platform.compile(lambda x_N: platform._bridge.apply(for_chips, x_N), Bucket(16, 1))
    says = (
        "A step of 16 tokens × 1 requests does not compile for v6e: report it .*--attention tpu-gather.*interpret mode"
    )
    with pytest.raises(ConfigError, match=says) as refusal:
        program(torch.zeros(16))
    assert isinstance(refusal.value.__cause__, ValueError)


def test_outside_of_steps_too(platform):
    with pytest.raises(
        ConfigError, match=r"The program of for_chips does not compile for v6e: report it.*interpret mode"
    ):
        platform._bridge.apply(for_chips, torch.zeros(16))


def faulty(x_N):
    """What is wrong is our own code."""
    raise ValueError("a fault of ours")


def test_faults_of_our_own_code_stay_what_they_are(platform):
    program = platform.compile(lambda x_N: platform._bridge.apply(faulty, x_N), Bucket(16, 1))
    for fails in (program, lambda x_N: platform._bridge.apply(faulty, x_N)):
        with pytest.raises(ValueError, match="a fault of ours"):
            fails(torch.zeros(16))


def test_a_model_that_does_not_fit_is_refused_with_a_remedy(platform, monkeypatch):
    monkeypatch.setattr(JaxBridge, "adopt", fail(LACKS_HBM))
    with pytest.raises(ConfigError, match=r"The model does not fit into the memory of v6e.*quantize"):
        platform.adopt(torch.zeros(3))


def test_a_cache_that_does_not_fit_is_refused_with_a_remedy(platform):
    """By the host's allocator, which has no petabyte."""
    with pytest.raises(
        ConfigError, match=r"The KV cache does not fit into the memory of v6e.*kv-cache-memory.*allocating"
    ):
        platform._bridge.allocate((1 << 48,), torch.float32)


def test_other_faults_stay_what_they_are(platform, monkeypatch):
    monkeypatch.setattr(JaxBridge, "adopt", fail("INTERNAL: no chip answers"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no chip answers"):
        platform.adopt(torch.zeros(3))


def test_what_is_explained_is_not_explained_again():
    fault = ConfigError(f"The step does not fit. ({LACKS_HBM})")
    with pytest.raises(ConfigError) as caught, explained("TPU v5 lite", "The model"):
        raise fault
    assert caught.value is fault


def fail(fault, error=jax.errors.JaxRuntimeError):
    def failing(*given):
        raise error(fault)

    return failing

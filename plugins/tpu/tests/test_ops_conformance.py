"""The operations, as programs of their own that execute on the host."""

import pytest
import torch

from dovetail.testing.conformance import OpsSuite, registered
from dovetail.testing.conformance import ops as suite
from dovetail.testing.conformance.suite import Scenario

FP8 = torch.float8_e4m3fn
FEW = {  # of the suite's tests
    "test_weight_only_mm": ({"narrow": torch.int8, "group": None}, {"narrow": FP8, "group": 24}),
    "test_scaled_mm": ({"narrow": torch.int8, "per_token": True}, {"narrow": FP8, "per_token": False}),
    "test_block_scaled_mm": ({"narrow": FP8},),
    "test_w4a16_mm": ({"zeros": True},),
    "test_moe_experts": ({"choices": 2},),
    "test_choose_experts": ({"experts": 6, "active": 2, "normalize": True},),
    "test_rms_norm": ({"width": 100},),
    "test_rms_norm_of_heads": ({},),
    "test_add_rms_norm": ({"width": 48},),
    "test_add_rms_norm_quantize": ({"narrow": torch.int8, "group": None}, {"narrow": FP8, "group": 32}),
    "test_gated_activations": ({"name": "silu_and_mul"}, {"name": "gelu_tanh_and_mul"}),
    "test_linear_silu_and_mul": ({"inputs": 48, "outputs": 63, "bias": True},),
    "test_silu_and_mul_quantize": ({"narrow": FP8, "group": None},),
    "test_seeded_sample": ({"filters": {"top_p": 0.6}},),
    "test_filter_logits": ({"filters": {"min_p": 0.1}},),
    "test_sample_residual": ({"size": 100},),
}


@pytest.mark.slow
class TestOps(OpsSuite):
    subject = registered("tpu")


@pytest.mark.parametrize(("test", "arguments"), [(test, arguments) for test in FEW for arguments in FEW[test]])
def test_few(test, arguments, monkeypatch):
    """Every operation that is overridden: each size is compiled anew, so there are few of them, in either dtype."""
    dtype = (torch.float32, torch.bfloat16)[len(test) % 2]
    monkeypatch.setattr(suite, "TOKENS", (0, 7))
    ops = TestOps()
    ops.scenario_id = Scenario.of(getattr(OpsSuite, test)).id
    getattr(ops, test)(dtype=dtype, **arguments)

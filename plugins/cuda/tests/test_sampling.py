import pytest
import torch

from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors
from dovetail_cuda.sampling import sample


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("temperatures", [[0.0, 0.5, 1.0, 1.7] * 8, [0.0] * 32, [1.0] * 32], ids=str)
def test_tokens_are_those_of_the_reference(temperatures, top_k):
    rows = len(temperatures)
    params = SamplingTensors(
        temperature_S=torch.tensor(temperatures),
        top_k_S=torch.full((rows,), top_k),
        top_p_S=torch.ones(rows),
        min_p_S=torch.zeros(rows),
        seeds_S=torch.arange(rows) * 7919 - 5,
        positions_S=torch.arange(rows) % 11,
        all_greedy=not any(temperatures),
        any_filter=top_k > 0,
    )
    logits = 3 * torch.randn(rows, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, params), reference.sample(logits, params))

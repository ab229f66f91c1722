"""What layers that slide save: pages held by a model of which five of six layers see 1024 tokens, at 8192 tokens."""

import pytest

from dovetail.contracts.executor import Progress
from dovetail.kv.groups import group_layers
from dovetail.scheduler.scheduler import Scheduler
from dovetail.testing import ScriptedExecutor, engine_config, engine_request

CONTEXT, WINDOW, STEP = 8192, 1024, 2048


def pages_held(windows: list[int | None]) -> tuple[int, int]:
    """Pages of single layers in use: the most while the prompt is computed, and the most while tokens are generated."""
    groups = group_layers([(window, 4, 256) for window in windows])
    config = engine_config(
        max_model_len=CONTEXT, max_num_seqs=1, max_num_batched_tokens=STEP, block_size=16, enable_prefix_caching=False
    )
    executor = ScriptedExecutor(config, groups=groups)
    scheduler = Scheduler(config, executor.load(Progress()))
    scheduler.add(engine_request([i % 100 for i in range(CONTEXT - 8)], max_tokens=8))
    pool, depth = scheduler.kv.pool, max(len(group.layers) for group in groups)
    peaks = {True: 0, False: 0}
    while scheduler.has_work():
        plan = scheduler.plan()
        decoding = plan.num_computed[0] >= CONTEXT - 8
        peaks[decoding] = max(peaks[decoding], (pool.num_blocks - 1 - pool.num_free) * depth)
        scheduler.commit(plan, executor.run(plan))
    return peaks[False], peaks[True]


@pytest.mark.parametrize("layers", [26, 34, 48, 62])
def test_pages_of_a_model_that_slides(layers: int) -> None:
    windows = [WINDOW if (layer + 1) % 6 else None for layer in range(layers)]
    full_prefill, full_decode = pages_held([None] * layers)
    assert full_prefill == full_decode == layers * CONTEXT // 16
    prefill, decode = pages_held(windows)
    assert decode <= 0.35 * full_decode
    assert prefill <= 0.55 * full_prefill  # a step of 2048 tokens stores them all before the window moves on

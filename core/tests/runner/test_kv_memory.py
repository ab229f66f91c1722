"""How many KV blocks the device gets."""

from __future__ import annotations

import pytest
import torch

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import MemoryInfo
from dovetail.errors import ConfigError
from dovetail.platforms.cpu.reference_attention import ReferenceAttention
from dovetail.runner import kv_memory
from dovetail.testing import engine_config

FULL = (KVGroup(layers=(0, 1)),)
MIXED = (KVGroup(layers=(0, 2)), KVGroup(layers=(1, 3), window=8))


def spec(kv_heads=2):
    return AttentionSpec(num_heads=4, num_kv_heads=kv_heads, head_size=16, scale=0.25)


def backend():
    device = torch.device("cpu")
    return ReferenceAttention(ops=OpTable(), device=device, dtype=torch.float32, kv_dtype=torch.float32, block_size=4)


def test_a_block_is_as_large_as_its_group_has_layers():
    page = 2 * 4 * 2 * 16 * 4
    assert kv_memory.block_bytes([spec(), spec()], FULL, backend()) == 2 * page
    with pytest.raises(ConfigError, match=r"KV pages of \[512, 1024\] bytes; they must be equal"):
        kv_memory.block_bytes([spec(1), spec(2)], FULL, backend())


def free(available):
    return MemoryInfo(total=2 * available, available=available)


def test_a_share_of_the_devices_own_memory_less_what_is_used():
    config = engine_config(max_model_len=64, max_num_seqs=3, memory_fraction=0.9)  # 49 blocks for full contexts
    own = MemoryInfo(total=20_000, available=15_000, dedicated=True)
    assert kv_memory.num_blocks(config, 100, FULL, own) == (18_000 - 5_000) // 100
    counted = MemoryInfo(total=20_000, available=15_000, dedicated=True, held=3_000, peak=4_000)
    assert kv_memory.num_blocks(config, 100, FULL, counted) == (18_000 - 4_000) // 100
    default = engine_config(max_model_len=64, max_num_seqs=3)
    assert kv_memory.num_blocks(default, 100, FULL, counted) == 3 * 16 + 1
    assert kv_memory.num_blocks(default, 800, FULL, counted) == (18_000 - 4_000) // 800
    half = engine_config(max_model_len=64, memory_fraction=0.5)
    assert kv_memory.num_blocks(half, 100, FULL, counted) == (10_000 - 4_000) // 100
    crowded = MemoryInfo(total=20_000, available=9_000, dedicated=True, held=3_000, peak=4_000)
    assert kv_memory.num_blocks(config, 100, FULL, crowded) == (9_000 - 1_000) // 100
    with pytest.raises(ConfigError, match=r"asks for 7.8 KiB, but 7.8 KiB are free on the device beside the largest"):
        kv_memory.num_blocks(engine_config(max_model_len=64, kv_cache_memory=8_001), 100, FULL, crowded)


def test_a_large_device_holds_no_more_blocks_than_the_host_can_list(monkeypatch):
    monkeypatch.setattr(kv_memory, "MOST_BLOCKS", 60)
    own = MemoryInfo(total=20_000, available=20_000, dedicated=True)
    for requests, blocks in ((3, 60), (5, 5 * 16 + 1)):
        config = engine_config(max_model_len=64, max_num_seqs=requests, memory_fraction=0.9)
        assert kv_memory.num_blocks(config, 100, FULL, own) == blocks


def test_what_is_missing_on_a_device_and_what_to_set():
    config = engine_config(max_model_len=64, memory_fraction=0.5)
    counted = MemoryInfo(total=20_480, available=15_000, dedicated=True, held=8_000, peak=9_216)
    with pytest.raises(ConfigError) as caught:
        kv_memory.num_blocks(config, 400, FULL, counted)
    assert str(caught.value) == (
        "One request of --max-model-len 64 needs 6.6 KiB of KV cache, and the cache has 1.0 KiB, so 5.6 KiB are "
        "missing. --memory-fraction 0.5 of the device's 20.0 KiB are 10.0 KiB; weights and the largest step take "
        "9.0 KiB. Set --memory-fraction to 0.783, or lower --max-model-len or --max-num-batched-tokens."
    )
    kv_memory.num_blocks(engine_config(max_model_len=64, memory_fraction=0.783), 400, FULL, counted)
    with pytest.raises(ConfigError, match=r"the cache has 0.0 KiB.* Lower --max-model-len or .*, quantize the weights"):
        kv_memory.num_blocks(config, 1000, FULL, MemoryInfo(total=20_000, available=8_000, dedicated=True))


def test_a_step_is_tried_over_the_cache_that_it_will_have_if_that_is_known():
    own = MemoryInfo(total=20_000, available=17_000, dedicated=True, held=3_000, peak=3_000)

    def blocks(size, **choices):
        config = engine_config(max_model_len=64, max_num_seqs=3, **choices)
        return kv_memory.trial_blocks(config, size, FULL, own)

    assert blocks(100) == 3 * 16 + 1
    assert [blocks(size) for size in (8_500 // 49, 8_500 // 49 + 1)] == [49, 1]  # half of the memory
    assert blocks(100, memory_fraction=0.9) == 1
    assert [blocks(100, kv_cache_memory=size) for size in (2_050, 8_500, 8_600)] == [20, 85, 1]
    assert blocks(100, kv_cache_memory=50) == 1
    with pytest.raises(ConfigError, match="--kv-cache-memory asks for"):
        blocks(100, kv_cache_memory=17_001)


def test_memory_without_a_cache_that_is_there():
    there = MemoryInfo(total=20_000, available=15_000, dedicated=True, held=5_000, peak=6_000)
    freed = MemoryInfo(total=20_000, available=17_000, dedicated=True, held=3_000, peak=4_000)
    assert kv_memory.without(there, 2_000) == freed
    uncounted = MemoryInfo(total=20_000, available=15_000)
    assert kv_memory.without(uncounted, 0) == uncounted


def test_the_hosts_memory_has_no_fraction():
    config = engine_config(max_model_len=64, memory_fraction=0.5)
    with pytest.raises(
        ConfigError, match=r"--memory-fraction is for devices .* 'scripted' shares .* --kv-cache-memory"
    ):
        kv_memory.num_blocks(config, 100, FULL, free(10_000))


def test_the_default_holds_full_contexts_within_a_quarter():
    config = engine_config(max_model_len=64, max_num_seqs=3)  # 16 blocks of 4 each
    assert kv_memory.num_blocks(config, 100, FULL, free(10**9)) == 3 * 16 + 1
    assert kv_memory.num_blocks(config, 100, MIXED, free(10**9)) == 2 * 3 * 16 + 1  # a step may fill 64 tokens
    assert kv_memory.num_blocks(config, 100, FULL, free(4 * 2000)) == 20


def test_a_window_reserves_what_it_shows_and_a_step_adds():
    config = engine_config(max_model_len=64, max_num_seqs=3, max_num_batched_tokens=10)
    # 7 + 10 tokens, across page borders
    assert kv_memory.num_blocks(config, 100, MIXED, free(10**9)) == 3 * (16 + 6) + 1
    config = engine_config(max_model_len=64, max_num_batched_tokens=10, kv_cache_memory=2300)
    assert kv_memory.num_blocks(config, 100, MIXED, free(10**9)) == 23
    with pytest.raises(ConfigError, match="One request of --max-model-len 64"):
        kv_memory.num_blocks(engine_config(max_model_len=64, kv_cache_memory=2300), 100, MIXED, free(10**9))


def test_asked_memory_is_taken_as_asked_or_refused():
    config = engine_config(max_model_len=64, kv_cache_memory=5000)
    assert kv_memory.num_blocks(config, 100, FULL, free(10**6)) == 50
    with pytest.raises(ConfigError, match=r"--kv-cache-memory asks for .* are free on the device"):
        kv_memory.num_blocks(config, 100, FULL, free(4999))
    with pytest.raises(ConfigError) as caught:
        kv_memory.num_blocks(config, 1000, FULL, free(10**6))
    assert str(caught.value) == (
        "One request of --max-model-len 64 needs 16.6 KiB of KV cache, and the cache has 4.9 KiB, so 11.7 KiB are "
        "missing. Set --kv-cache-memory to 0.001 or lower --max-model-len."
    )


def test_groups_share_storage_layer_by_layer():
    caches = kv_memory.allocate([spec()] * 4, MIXED, backend(), blocks=5)
    assert caches[0] is caches[1]
    assert caches[2] is caches[3]
    assert caches[0] is not caches[2]

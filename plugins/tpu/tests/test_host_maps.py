"""Where a process could take no more programs, it is told so."""

from functools import lru_cache

import jax.numpy as jnp
import pytest
import torch
from jax import lax

from dovetail.errors import ConfigError
from dovetail_tpu import bridges
from dovetail_tpu.bridges import host_maps, jax_bridge


def compile_one():
    bridge = bridges.open_bridge()
    return bridge.compile(bridge.trace(lambda packed_W: [packed_W + 1], 3))


def test_a_process_without_room_is_told_what_to_change(monkeypatch, tmp_path):
    compile_one()
    monkeypatch.setattr(host_maps, "MOST", tmp_path / "max_map_count")
    host_maps.MOST.write_text("300")
    with pytest.raises(ConfigError, match=r"may have 300\. Choose --attention tpu-gather"):
        compile_one()


def test_where_maps_are_not_counted_there_is_room(monkeypatch, tmp_path):
    monkeypatch.setattr(host_maps, "MAPS", tmp_path / "maps")
    compile_one()


def test_programs_that_are_let_go_of_leave_no_maps(monkeypatch):
    """Of calls outside of steps, few are kept."""
    few = lru_cache(maxsize=4)(jax_bridge._compiled.__wrapped__)
    monkeypatch.setattr(jax_bridge, "_compiled", few)
    bridge, counts = bridges.open_bridge("jax"), []
    for size in range(5, 25):
        bridge.apply(kernels, torch.ones(size))
        counts.append(len(host_maps.MAPS.read_text().splitlines()))
    of_each = 3  # of a kernel, at least
    assert counts[3] > counts[0] + 3 * of_each
    assert counts[-1] < counts[3] + len(counts[3:]) * of_each


def kernels(x_N):
    """Some."""
    return (lax.fori_loop(0, 5, lambda i, x_N: jnp.sort(jnp.sin(x_N) * i) + lax.cummax(x_N[::-1]), x_N),)

"""Where a process could take no more programs, it is told so."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from time import sleep

import jax
import jax.numpy as jnp
import pytest
import torch
from jax import lax

from dovetail.errors import ConfigError
from dovetail_tpu import bridges
from dovetail_tpu.bridges import host_maps, jax_bridge
from dovetail_tpu.bridges.jax_bridge import JaxBridge


def compile_one():
    bridge = bridges.open_bridge()
    return bridge.compile(bridge.trace(lambda packed_W: [packed_W + 1], 3))


def test_a_process_without_room_is_told_what_to_change(monkeypatch, tmp_path):
    compile_one()
    monkeypatch.setattr(host_maps, "MOST", tmp_path / "max_map_count")
    host_maps.MOST.write_text("300")
    with pytest.raises(ConfigError, match=r"may have 300\. Choose --attention tpu-gather"):
        compile_one()


def test_threads_that_compile_do_not_take_what_is_left_together(monkeypatch, tmp_path):
    """Each program takes 30 maps of 100; from 75 on, none is begun."""
    monkeypatch.setattr(host_maps, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(host_maps, "MOST", tmp_path / "max_map_count")
    host_maps.MAPS.touch()
    host_maps.MOST.write_text("100")
    lower = JaxBridge.lowered

    def lowered(bridge, traced):
        sleep(0.02)
        with host_maps.MAPS.open("a") as maps:
            maps.write("a map\n" * 30)
        return lower(bridge, traced)

    monkeypatch.setattr(JaxBridge, "lowered", lowered)
    bridge = bridges.open_bridge("jax")
    traced = bridge.trace(lambda packed_W: [packed_W + 1], 3)
    with ThreadPoolExecutor(4) as threads:
        begun = [threads.submit(bridge.compile, traced) for _ in range(4)]
    (fault,) = filter(None, [future.exception() for future in begun])
    assert "have taken 90 memory maps of this process, which may have 100" in str(fault)


def test_where_maps_are_not_counted_there_is_room(monkeypatch, tmp_path):
    monkeypatch.setattr(host_maps, "MAPS", tmp_path / "maps")
    compile_one()


def test_programs_that_are_let_go_of_leave_no_maps(monkeypatch):
    """Of calls outside of steps, few are kept."""
    monkeypatch.setattr(jax_bridge, "_few", lru_cache(4)(jax_bridge._compiled))
    bridge, counts = JaxBridge(jax.devices()[:1]), []
    for size in range(5, 25):
        bridge.apply(kernels, torch.ones(size))
        counts.append(len(host_maps.MAPS.read_text().splitlines()))
    of_each = 3  # of a kernel, at least
    assert counts[3] > counts[0] + 3 * of_each
    assert counts[-1] < counts[3] + len(counts[3:]) * of_each


@pytest.mark.parametrize(("is_host", "again"), [(True, 20), (False, 0)])
def test_on_a_chip_eager_steps_find_theirs_again(monkeypatch, is_host, again):
    monkeypatch.setattr(jax_bridge, "_few", lru_cache(4)(jax_bridge._compiled))
    monkeypatch.setattr(JaxBridge, "_is_host", is_host)
    bridge, met = JaxBridge(jax.devices()[:1]), []

    def add_one(x_N):
        met.append(x_N.shape)
        return (x_N + 1,)

    for compiled in (20, 20 + again):
        for size in range(20):
            bridge.apply(add_one, torch.ones(size))
        assert len(met) == compiled


def kernels(x_N):
    """Some."""
    return (lax.fori_loop(0, 5, lambda i, x_N: jnp.sort(jnp.sin(x_N) * i) + lax.cummax(x_N[::-1]), x_N),)

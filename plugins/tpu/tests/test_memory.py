"""What the platform says about memory, on a chip and on the host."""

from dataclasses import replace
from threading import Event
from time import sleep
from weakref import ref

import pytest
import torch

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail.errors import ConfigError
from dovetail.testing.conformance import PlatformSuite, registered, unregistered
from dovetail_tpu import compile_pool
from dovetail_tpu.bridges.jax_bridge import JaxBridge
from dovetail_tpu.bridges.protocol import ChipMemory
from dovetail_tpu.platform import TpuPlatform

MANIFEST = registered("tpu").find("platforms").manifest


def test_the_peak_is_what_is_held_and_the_largest_program(monkeypatch):
    platform = TpuPlatform(PlatformConfig())
    monkeypatch.setattr(JaxBridge, "memory", lambda bridge: ChipMemory(total=1000, held=300))
    assert platform.memory().peak == 300
    temps = iter([50, 70, 20])
    compile_it = JaxBridge.compile

    def compiled(bridge, traced):
        executable = compile_it(bridge, traced)
        object.__setattr__(executable, "temp_bytes", next(temps))
        return executable

    monkeypatch.setattr(JaxBridge, "compile", compiled)
    for tokens in (16, 32, 64):
        platform.compile(lambda x: (x + 1,), Bucket(tokens, 1))(torch.zeros(tokens))
    memory = platform.memory()
    assert (memory.total, memory.available, memory.held, memory.peak, memory.dedicated) == (1000, 700, 300, 370, True)


def test_on_the_host_peaks_are_not_counted():
    memory = TpuPlatform(PlatformConfig()).memory()
    assert memory.peak is None
    assert not memory.dedicated


def test_eager_steps_and_weights_stay_on_the_host():
    platform = TpuPlatform(PlatformConfig(eager=True))
    table = torch.ones(3)
    assert platform.adopt(table) is table
    step = lambda x: (x * table,)  # noqa: E731
    assert platform.compile(step, Bucket(16, 1)) is step
    platform.warmed_up()


def on_a_chip(monkeypatch, temp=lambda executable: executable.compiled.memory_analysis().temp_size_in_bytes):
    """As if programs ran on one, whose compiler counts ``temp`` of each."""
    compile_it = JaxBridge.compile

    def compiled(bridge, traced):
        executable = compile_it(bridge, traced)
        return replace(executable, temp_bytes=temp(executable))

    monkeypatch.setattr(JaxBridge, "memory", lambda bridge: ChipMemory(total=16 << 30, held=1 << 30))
    monkeypatch.setattr(JaxBridge, "compile", compiled)


def test_the_suite_sees_the_peak_of_steps(monkeypatch):
    """With what the host's compiler counts."""
    suite = type("OnAChip", (PlatformSuite,), {"subject": unregistered(TpuPlatform, MANIFEST)})()
    on_a_chip(monkeypatch)
    suite.test_memory()
    on_a_chip(monkeypatch, lambda executable: 0)
    with pytest.raises(pytest.fail.Exception, match="lacks the peak of a step"):
        suite.test_memory()


def test_where_the_compiler_says_nothing_a_part_is_set_aside(monkeypatch, caplog):
    on_a_chip(monkeypatch, lambda executable: None)
    platform = TpuPlatform(PlatformConfig())
    assert platform.memory().peak == 1 << 30
    platform.compile(lambda x: (x + 1,), Bucket(16, 1))(torch.zeros(16))
    memory = platform.memory()
    assert memory.peak - memory.held == 2 << 30
    assert "2.00 GiB of each chip are set aside" in caplog.text


@pytest.mark.parametrize("temp", [None, 100])
def test_the_largest_step_runs_before_serving_where_the_compiler_says_nothing(monkeypatch, temp):
    on_a_chip(monkeypatch, lambda executable: temp)
    platform, ran = TpuPlatform(PlatformConfig()), []
    call = JaxBridge.call
    monkeypatch.setattr(JaxBridge, "call", lambda bridge, *given: (ran.append(len(given[1])), call(bridge, *given))[1])
    programs = [compiled(platform, tokens) for tokens in (16, 64, 64, 32)]
    platform.await_compiled(lambda done, total: None)
    assert len(ran) == (2 if temp is None else 0)
    assert len(set(ran)) <= 1
    assert programs


def test_a_step_that_was_let_go_of_holds_no_cache(monkeypatch):
    """Such as one over a cache for trial, beside which the final one may not fit."""
    on_a_chip(monkeypatch, lambda executable: None)
    platform, ran = TpuPlatform(PlatformConfig()), []
    (variant,) = map(ref, compiled(platform, 64)._variants.values())
    platform.memory()
    assert variant() is None
    monkeypatch.setattr(JaxBridge, "call", lambda *given: ran.append(given))
    platform.await_compiled(lambda done, total: None)
    assert not ran


def test_a_step_that_does_not_run_beside_the_cache_is_refused_before_serving(monkeypatch):
    def exhausted(bridge, executable, packed_W):
        raise RuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 3.00G. That was not possible. HBM")

    on_a_chip(monkeypatch, lambda executable: None)
    monkeypatch.setattr(JaxBridge, "call", exhausted)
    platform = TpuPlatform(PlatformConfig())
    program = compiled(platform, 16)
    with pytest.raises(ConfigError, match=r"largest step does not fit into the memory .* --kv-cache-memory"):
        platform.await_compiled(lambda done, total: None)
    assert program


def test_programs_that_are_queued_are_dropped_where_loading_fails(monkeypatch):
    begun, release = [], Event()
    monkeypatch.setattr(compile_pool, "MOST_THREADS", 1)
    monkeypatch.setattr(JaxBridge, "compile", lambda bridge, traced: (begun.append(1), release.wait(10)))
    platform = TpuPlatform(PlatformConfig())
    for tokens in (64, 32, 16):
        compiled(platform, tokens)
    while not begun:
        sleep(0.001)
    platform.close()
    assert all(future.cancelled() for future in platform._programs.pool._under_way[1:])
    release.set()
    platform.close()


def compiled(platform, tokens):
    """A program of a step that was met with padding."""
    program = platform.compile(lambda step: (step.token_ids_T + 1,), Bucket(tokens, 2))
    program(padded(tokens))
    return program


def padded(tokens):
    """A step of padding alone."""
    zeros, ends = torch.zeros(tokens, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    return StepTensors(
        token_ids_T=zeros,
        positions_T=zeros,
        query_start_R1=torch.zeros(3, dtype=torch.int32),
        seq_lens_R=ends,
        block_tables=[torch.zeros(2, 3, dtype=torch.int32)],
        slot_mapping=[zeros],
        logits_rows_S=zeros,
        max_query_len=0,
        max_seq_len=0,
    )

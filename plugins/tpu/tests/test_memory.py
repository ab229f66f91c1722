"""What the platform says about memory, on a chip and on the host."""

import torch

from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail_tpu.bridges.jax_bridge import JaxBridge
from dovetail_tpu.bridges.protocol import ChipMemory
from dovetail_tpu.platform import TpuPlatform


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

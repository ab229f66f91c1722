"""Trial: steps of a model on a slice that is not there, compiled as an engine on it would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.config import EngineConfig
from dovetail.contracts.executor import Progress
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import TensorSpec
from dovetail.runner import kv_memory
from dovetail.runner.dummy_weights import fill
from dovetail.runner.load import load_selection, platform_config
from dovetail.runner.loaded_model import LoadedModel, unfilled
from dovetail.runner.slots import SlotTables
from dovetail.runner.stepped import Stepper
from dovetail.runner.steppers import with_sampling
from dovetail_tpu.aot import AotBridge, AotProgram, caches_of
from dovetail_tpu.platform import TpuPlatform
from dovetail_tpu.slices import Slice


class Trial:
    """A model on a mesh; none of it takes memory.

    Args:
        config: of an engine on platform ``tpu``.
        target: the slice.
        devices: of it that the mesh has; all if not given.

    Attributes:
        block_bytes: of a block of the cache, on each device.
        weight_bytes: of weights and tables, on each device.
        full: blocks of as many full contexts as may run.
        programs: that an engine compiles.

    Raises:
        ConfigError: the model does not divide evenly, or something of it exceeds what the chip has.
    """

    def __init__(self, config: EngineConfig, target: Slice, devices: int | None = None) -> None:
        self._bridge = AotBridge(target, devices)
        self._platform = platform = TpuPlatform(platform_config(config), self._bridge)
        dtype: torch.dtype = getattr(torch, config.dtype)
        ops = OpTable(**platform.ops(dtype))
        with torch.inference_mode():
            model = unfilled(config, ops, torch.device("meta"))
            fill(model, _shape_only, Progress())
        backend = load_selection(config.attention)(
            ops=ops,
            device=platform.device,
            dtype=dtype,
            kv_dtype=getattr(torch, config.kv_dtype),
            block_size=config.block_size,
        )
        facts = type(model).facts(config.hf_config)
        loaded = LoadedModel(config, platform, facts, platform.adopt(model), backend)
        groups = kv_memory.groups_of(facts.attention)
        self.full = config.max_num_seqs * kv_memory.blocks_per_request(config, groups) + 1
        self.block_bytes = loaded.block_bytes(groups) // self._bridge.num_devices
        tables = SlotTables(config.max_num_seqs, config.max_model_len, config.block_size, len(groups), platform)
        shapes = platform.shape_policy(config.max_num_batched_tokens, config.max_num_seqs)
        self.programs = 2 * len(shapes.ladder()) + 1
        sampling = with_sampling(config, platform, ops, shapes)
        drafts = config.num_speculative_tokens

        def stepper(blocks: int) -> Stepper:
            return sampling(loaded.forward_pass(groups, blocks, tables, shapes, 1 + drafts))

        self._stepper = stepper
        self.weight_bytes = self._bridge.held()

    def compile(self, steps: Sequence[tuple[int, int]], blocks: int, *, ruled: bool = False) -> list[AotProgram]:
        """The programs in which steps of so many tokens of so many requests run, in order.

        Args:
            blocks: of the cache.
            ruled: those in which a request has rules, such as penalties, or wants log-probabilities.

        Raises:
            ConfigError: one does not fit; says what to change.
        """
        stepper = self._stepper(blocks)
        programs = []
        for tokens, requests in steps:
            before = len(self._bridge.traced)
            stepper.warm_up(stepper.forward.bucket(tokens, requests))
            plain, *others = [traced for traced in self._bridge.traced[before:] if caches_of(traced)]
            programs.append(self._bridge.program(others[-1] if ruled else plain))
        stepper.close()
        return programs


def _shape_only(spec: TensorSpec, device: torch.device) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)

"""Weights without a checkpoint: for benchmarks, which need a model's shapes and not its words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model
from dovetail.contracts.quant import TensorSpec
from dovetail.layers.block import Block
from dovetail.runner.loader import Plan, Target, empty

LARGEST = 1e-3
"""Small enough that no activation overflows, however many layers there are."""


def fill_with_noise(model: Model, progress: Progress) -> None:
    """Fill every block of ``model``: numbers uniform within ±``LARGEST``, the same at each start; integers are 0.

    Raises:
        ModelLoadError: the model holds parameters outside of blocks.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def noise(spec: TensorSpec, device: torch.device) -> Tensor:
        return _noise(spec, device, generators.setdefault(device, torch.Generator(device).manual_seed(0)))

    fill(model, noise, progress)


def fill(model: Model, make: Callable[[TensorSpec, torch.device], Tensor], progress: Progress) -> None:
    """Fill every block of ``model`` with tensors that are made for it.

    Tensors that a checkpoint may leave out are left out, and tied ones are shared.

    Raises:
        ModelLoadError: the model holds parameters outside of blocks.
    """
    blocks = Plan(model).blocks
    ties = {Target.of(name): Target.of(source) for name, source in model.weight_table().tied.items()}
    made: dict[Target, Tensor] = {}
    sources = set(ties.values())
    names = sorted(blocks, key=lambda name: any(target.block == name for target in ties))  # sources before ties
    for done, name in enumerate(names):
        block = blocks[name]
        tensors = _tensors(name, block, ties, made, make)
        made |= {Target(name, suffix): x for suffix, x in tensors.items() if Target(name, suffix) in sources}
        block.finalize(tensors)
        progress.update("load", done + 1, len(names))


def _tensors(
    name: str,
    block: Block,
    ties: Mapping[Target, Target],
    made: Mapping[Target, Tensor],
    make: Callable[[TensorSpec, torch.device], Tensor],
) -> dict[str, Tensor]:
    """One block's tensors, by suffix."""
    tensors = {}
    for suffix, spec in block.specs.items():
        target = Target(name, suffix)
        if target in ties:
            tensors[suffix] = made[ties[target]]
        elif not spec.optional:
            tensors[suffix] = make(spec, block.device)
    return tensors


def _noise(spec: TensorSpec, device: torch.device, generator: torch.Generator) -> Tensor:
    tensor = empty(spec.shape, spec.dtype, device)
    if not spec.dtype.is_floating_point:
        return tensor.zero_()
    if spec.dtype.itemsize > 1:
        return tensor.uniform_(-LARGEST, LARGEST, generator=generator)
    wide = torch.empty(spec.shape, device=device).uniform_(-LARGEST, LARGEST, generator=generator)
    return tensor.copy_(wide)

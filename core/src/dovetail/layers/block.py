"""Block: a module that owns tensors of the checkpoint.

A block declares what it expects; the loader allocates each tensor when its first bytes arrive, fills it, and hands all
of them over at once. Nothing is allocated earlier and nothing is kept twice, so that loading peaks near the final size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dovetail.contracts.quant import TensorSpec


class Block(nn.Module, ABC):
    """A module with tensors of its own.

    Attributes:
        device: where its tensors live.
        specs: the tensors it expects, by the suffix of their checkpoint name; empty once they are in place.
        outputs: output features of a merged layer by shard, in order; empty if one checkpoint tensor fills each spec.
    """

    def __init__(
        self, device: torch.device, specs: Mapping[str, TensorSpec], outputs: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.device = device
        self.specs = dict(specs)
        self.outputs = dict(outputs or {})

    def shard_range(self, suffix: str, shard: str) -> tuple[int, int]:
        """Start and length of one shard of a merged layer along the tensor's ``output_dim``."""
        numerator, denominator = self.specs[suffix].output_scale
        start = 0
        for name, size in self.outputs.items():
            if name == shard:
                return start * numerator // denominator, size * numerator // denominator
            start += size
        raise KeyError(shard)

    def finalize(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the loaded tensors, by suffix; called once. Optional ones may be absent."""
        self.accept(tensors)
        self.specs = {}

    @abstractmethod
    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring the loaded tensors into the form that the forward pass reads.

        Results are kept as plain attributes: the forward pass then avoids the attribute lookup of ``nn.Module``.
        """
        ...

"""A mixture of experts in a number format, loaded from a checkpoint as those of a model are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import ModelContext, Rename, WeightTable
from dovetail.layers.experts import Experts
from dovetail.runner.loader import load_weights
from dovetail.testing.conformance.checkpoints import write_checkpoint
from dovetail.testing.conformance.linear_probe import Probe

EXPERTS = "layers.0.experts"
"""Dotted name of the probe's only layer. Checkpoints hold ``0.gate_proj``, ``0.up_proj``, ``0.down_proj`` … in it."""


class ExpertsProbe(Probe):
    """One mixture. Its config holds ``num_experts``, ``hidden_size`` and ``inner_size``."""

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        layer = nn.Module()
        self.layers = nn.ModuleList([layer])
        sizes = hf_config["hidden_size"], hf_config["inner_size"]
        self.experts = layer.experts = Experts(context, EXPERTS, hf_config["num_experts"], *sizes)

    def weight_table(self) -> WeightTable:
        """Three tensors of each expert fill two merged layers."""
        gate_up = [Rename(f"experts.*.{part}_proj", "experts.gate_up", f"*.{part}") for part in ("gate", "up")]
        return WeightTable(renames=[*gate_up, Rename("experts.*.down_proj", "experts.down", "*.down")])


def load_experts(
    folder: Path, context: ModelContext, tensors: Mapping[str, Tensor], num_experts: int, sizes: tuple[int, int]
) -> Experts:
    """The mixture with these tensors, by their names in the checkpoint, which is written into ``folder``.

    Args:
        sizes: of the hidden state and within an expert.
    """
    config = {"num_experts": num_experts, "hidden_size": sizes[0], "inner_size": sizes[1]}
    write_checkpoint(folder, config, tensors)
    with torch.inference_mode():
        probe = ExpertsProbe(config, context)
        load_weights(probe, folder, Progress())
    return probe.experts

"""Checkpoints with random weights, made from what a model declares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.model import Model
from dovetail.runner.loader import SINGLE, Plan, Target
from dovetail.runner.tensor_file import DTYPES

GAIN = 2.5
"""Matrices amplify by about this much, so that every part of a model shows in its logits."""


def write_checkpoint(folder: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write config.json and one file of tensors into ``folder``, which is made if need be and returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(hf_config)))
    write_tensors(folder / SINGLE, tensors)
    return folder


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; the format is described in :mod:`dovetail.runner.tensor_file`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    contents: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [end, end + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        contents.append(content)
        end = offsets[1]
    encoded = json.dumps(header).encode()
    file.write_bytes(b"".join([len(encoded).to_bytes(8, "little"), encoded, *contents]))


class Declared(NamedTuple):
    """A tensor that a checkpoint must hold: its name and shape there, and the dotted name of the block that it fills.
    """

    name: str
    shape: tuple[int, ...]
    block: str


def declared(model: Model) -> Iterator[Declared]:
    """Every tensor that a checkpoint must hold: the weight table read backwards.

    Raises:
        ModelLoadError: the model holds parameters outside of blocks.
    """
    plan = Plan(model)
    tied = model.weight_table().tied
    for name, block in plan.blocks.items():
        for suffix, spec in block.specs.items():
            if f"{name}.{suffix}" in tied or spec.optional:
                continue
            for shard in block.outputs or ("",):
                shape = list(spec.shape)
                if shard and spec.output_dim is not None:
                    shape[spec.output_dim] = block.shard_range(suffix, shard)[1]
                yield Declared(plan.checkpoint_name(Target(name, suffix), shard), tuple(shape), name)


def random_tensors(model: Model, seed: int = 0) -> dict[str, Tensor]:
    """A float32 checkpoint for ``model``: matrices of one scale, vectors around 1 (norms) or 0 (biases)."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, shape, _ in declared(model):
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            made[name] = GAIN * noise / shape[-1] ** 0.5
        else:
            made[name] = 0.2 * noise + float(name.endswith("weight"))
    return made

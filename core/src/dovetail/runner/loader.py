"""Filling a model from a checkpoint folder.

All names and shapes are checked before the first byte is copied. Then tensors stream from the mapped files into their
final place and dtype, and each layer is packed as soon as its last tensor is in place, so that memory peaks at the
weights plus one layer. Layers that make up a large part of the checkpoint go first, largest first, while the rest takes
no memory yet; the others follow in file order.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model, WeightTable
from dovetail.contracts.quant import TensorSpec
from dovetail.errors import ModelLoadError
from dovetail.layers.block import Block
from dovetail.runner.read_ahead import ReadAhead, Staging, unpinned
from dovetail.runner.tensor_file import StoredTensor, TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHOWN = 10
"""Names listed in an error before it says how many more there are."""
LARGE_SHARE = 32
"""A layer above one part in this many of the checkpoint loads before the others."""
MAPPED_BYTES = 1 << 18
"""Tensors of at least this size in host memory get a mapping of their own."""


_Chunks = Callable[[TensorFile, StoredTensor], Iterator[tuple[int, Tensor]]]


def load_weights(model: Model, path: Path, progress: Progress, staging: Staging = unpinned) -> None:
    """Fill every block of ``model`` from the safetensors files in ``path``; the model is ready to run afterwards.

    Args:
        model: as constructed.
        path: folder with ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        progress: receives stage ``"load"`` in bytes of the files.
        staging: host memory that tensors pass through on their way to a device.

    Raises:
        ModelLoadError: files are missing or corrupt; or tensors are missing, unexpected, doubled or misshapen, with
            their names.
    """
    plan = Plan(model)
    for file in weight_files(path):
        plan.add(TensorFile(file))
    plan.check(path)
    total = sum(move.stored.nbytes for move in plan.moves)
    done = 0
    filling = Filling(plan)
    moves = plan.in_order(total // LARGE_SHARE)
    with _chunks(moves, plan.device, staging) as chunks:
        for move in moves:
            for nbytes in filling.copy(move, chunks(move.file, move.stored)):
                done += nbytes
                progress.update("load", done, total)


@contextmanager
def _chunks(moves: Sequence[Move], device: torch.device, staging: Staging) -> Iterator[_Chunks]:
    """How to get the tensors of ``moves``, in that order. What stays in host memory is copied from the mapped files."""
    if device.type == "cpu":
        yield TensorFile.chunks
        return
    with ReadAhead([(move.file, move.stored) for move in moves], device, staging) as ahead:
        yield ahead.chunks


def weight_bytes(model: Model) -> int:
    """Of the tensors that a model without any is to be filled with."""
    ties = {Target.of(name) for name in model.weight_table().tied}
    return sum(
        math.prod(spec.shape) * spec.dtype.itemsize
        for name, block in Plan(model).blocks.items()
        for suffix, spec in block.specs.items()
        if not spec.optional and Target(name, suffix) not in ties
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        ModelLoadError: there are none, or the index is unreadable or names files elsewhere.
    """
    index = path / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelLoadError(f"{index} is unreadable ({reason}). Download it again.") from error
        strays = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if strays:
            raise ModelLoadError(f"{index} names files outside of its folder: {_listed(strays)}. Do not trust it.")
        return files
    if (path / SINGLE).exists():
        return [path / SINGLE]
    found = ", ".join(sorted(file.name for file in path.glob("*"))[:SHOWN])
    raise ModelLoadError(
        f"{path} has neither {SINGLE} nor {INDEX} (it holds: {found or 'nothing'}). "
        "Give a folder with safetensors weights; convert other formats first."
    )


class Target(NamedTuple):
    """A tensor of the model: dotted name of its block, and the tensor's suffix."""

    block: str
    suffix: str

    @classmethod
    def of(cls, name: str) -> Target:
        """Split a tensor's dotted name."""
        block, _, suffix = name.rpartition(".")
        return cls(block, suffix)


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor of a file, where it goes, and which shard of a merged layer it is (``""``: all of it)."""

    file: TensorFile
    stored: StoredTensor
    target: Target
    shard: str


def map_name(name: str, table: WeightTable) -> tuple[Target, str]:
    """Where a tensor of the checkpoint goes, and the shard that it fills (``""``: all of it)."""
    for prefix in table.strip_prefixes:
        name = name.removeprefix(prefix + ".")
    for rename in table.renames:
        match = _whole_parts(rename.pattern).search(name)
        if match:
            shard = (rename.shard or "").replace("*", "".join(match.groups()))
            return Target.of(name[: match.start()] + rename.into + name[match.end() :]), shard
    return Target.of(name), ""


@lru_cache(maxsize=1024)
def _whole_parts(pattern: str) -> re.Pattern[str]:
    """Finds a pattern of a weight table in a dotted name; what its ``*`` stands for is the only group."""
    parts = re.escape(pattern).replace(r"\*", "([^.]+)")
    return re.compile(rf"(?<![^.]){parts}(?![^.])")


class Plan:
    """Matches the tensors of the files to those of the model.

    Attributes:
        blocks: the model's, by dotted name.
        moves: what to copy, in file order.
        ties: target -> the target whose tensor it shares.
    """

    def __init__(self, model: Model) -> None:
        """Note what ``model`` expects.

        Raises:
            ModelLoadError: it holds parameters outside of blocks, which nothing would fill.
        """
        strays = [name for name, _ in model.named_parameters()]
        if strays:
            family = type(model).__name__
            raise ModelLoadError(f"{family} holds plain parameters ({_listed(strays)}); keep them in a Block.")
        self.blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
        self.moves: list[Move] = []
        self.ties: dict[Target, Target] = {}
        self._table = model.weight_table()
        self._open = {
            Target(name, suffix): set(block.outputs) or {""}
            for name, block in self.blocks.items()
            for suffix in block.specs
        }
        self._spelt = {
            Target(target.block, suffix): target for target in self._open for suffix in self.spec(target).also
        }
        self._unexpected: list[str] = []
        self._unusable: list[str] = []

    def add(self, file: TensorFile) -> None:
        """Place every tensor of a file, and note those that have no place."""
        for stored in file.tensors:
            if any(part in stored.name for part in self._table.ignore):
                continue
            target, shard = map_name(stored.name, self._table)
            target = self._spelt.get(target, target)
            label = f"{stored.name} ({file.path.name})"
            if target not in self._open or (shard and shard not in self.blocks[target.block].outputs):
                self._unexpected.append(label)
                continue
            self._unusable += (f"{label} {problem}" for problem in self._problems(stored, target, shard))
            self._open[target] -= {shard} if shard else self._whole(target)
            self.moves.append(Move(file, stored, target, shard))

    def check(self, path: Path) -> None:
        """Settle what was left out on purpose: optional and tied tensors.

        Raises:
            ModelLoadError: a tensor is missing, unexpected or unusable; names all that are.
        """
        tied = {Target.of(name): Target.of(source) for name, source in self._table.tied.items()}
        missing: list[str] = []
        for target, shards in self._open.items():
            absent = shards == self._whole(target)
            if absent and target in tied:
                self.ties[target] = tied[target]
            elif not (absent and self.spec(target).optional):
                missing += (self.checkpoint_name(target, shard) for shard in sorted(shards))
        problems = {"missing": missing, "unexpected": self._unexpected, "unusable": self._unusable}
        lines = [f"  {len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
        if lines:
            headline = f"The tensors of {path} do not fit the model that its config.json describes:"
            remedy = "Download the checkpoint again, or correct its config.json."
            raise ModelLoadError("\n".join([headline, *lines, remedy]))

    def in_order(self, large: int) -> list[Move]:
        """The moves as they should run: blocks of more than ``large`` bytes in front, by size."""
        sizes: Counter[str] = Counter()
        for move in self.moves:
            sizes[move.target.block] += move.stored.nbytes
        return sorted(self.moves, key=lambda move: min(0, large - sizes[move.target.block]))

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""
        return next(block.device for block in self.blocks.values())

    def spec(self, target: Target) -> TensorSpec:
        """What the block expects."""
        return self.blocks[target.block].specs[target.suffix]

    def _whole(self, target: Target) -> set[str]:
        return set(self.blocks[target.block].outputs) or {""}

    def _problems(self, stored: StoredTensor, target: Target, shard: str) -> Iterator[str]:
        spec = self.spec(target)
        shape = list(spec.shape)
        if shard and spec.output_dim is not None:
            shape[spec.output_dim] = self.blocks[target.block].shard_range(target.suffix, shard)[1]
        if spec.repeat > 1:
            shape[0] = -(-shape[0] // spec.repeat)
        if spec.broadcast:
            if list(stored.shape) not in ([], [1]):
                yield f"has shape {list(stored.shape)}, the model needs a single number"
        elif list(stored.shape) != shape:
            yield f"has shape {list(stored.shape)}, the model needs {shape}"
        coded = min(stored.dtype.itemsize, spec.dtype.itemsize) == 1  # 8 bits mean nothing without their scales
        if stored.dtype.is_floating_point != spec.dtype.is_floating_point or (coded and stored.dtype != spec.dtype):
            yield f"is {stored.dtype}, the model needs {spec.dtype}"
        if not ({shard} if shard else self._whole(target)) <= self._open[target]:
            yield "is there twice"

    def checkpoint_name(self, target: Target, shard: str) -> str:
        """What a checkpoint calls this tensor, or this shard of it: the inverse of :func:`map_name`."""
        name = ".".join(target)
        for rename in self._table.renames:
            part = _whole_parts(rename.shard or "").fullmatch(shard)
            place = _whole_parts(rename.into).search(name)
            if part and place:
                pattern = rename.pattern.replace("*", "".join(part.groups()))
                return name[: place.start()] + pattern + name[place.end() :]
        return name


class Filling:
    """Copies tensors into place and finalizes each block when its last one is there."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._left = Counter(move.target.block for move in plan.moves) + Counter(tie.block for tie in plan.ties)
        self._tensors: dict[str, dict[str, Tensor]] = {name: {} for name in plan.blocks}

    def copy(self, move: Move, chunks: Iterable[tuple[int, Tensor]]) -> Iterator[int]:
        """Copy one tensor piece by piece, given its rows; yields the bytes of each.

        Raises:
            ModelLoadError: parts of a merged layer that share this tensor bring different values.
        """
        place, shared = self._place(move)
        spec = self._plan.spec(move.target)
        for row, piece in chunks:
            whole = spec.broadcast or not piece.shape
            rows = place if whole else place[row * spec.repeat : (row + len(piece)) * spec.repeat]
            values = piece if spec.repeat == 1 else piece.repeat_interleave(spec.repeat, 0)[: len(rows)]
            if shared and not torch.equal(rows, values.to(rows)):
                raise ModelLoadError(
                    f"{move.stored.name} ({move.file.path}) differs from that of the other parts of "
                    f"{move.target.block}, which are computed as one and share it."
                )
            rows.copy_(values)
            yield piece.nbytes
        self._settle(move.target.block)

    def _place(self, move: Move) -> tuple[Tensor, bool]:
        """Where to copy to, allocated at first use, and whether another part of a merged layer has filled it."""
        block, suffix = self._plan.blocks[move.target.block], move.target.suffix
        spec = block.specs[suffix]
        tensors = self._tensors[move.target.block]
        first = suffix not in tensors
        if first:
            tensors[suffix] = empty(spec.shape, spec.dtype, block.device)
        if not move.shard:
            return tensors[suffix], False
        if spec.output_dim is None:
            return tensors[suffix], not first
        return tensors[suffix].narrow(spec.output_dim, *block.shard_range(suffix, move.shard)), False

    def _settle(self, name: str) -> None:
        self._left[name] -= 1
        if self._left[name]:
            return
        tensors = self._tensors.pop(name)
        self._plan.blocks[name].finalize(tensors)
        for target, source in self._plan.ties.items():
            if source.block == name:
                self._tensors[target.block][target.suffix] = tensors[source.suffix]
                self._settle(target.block)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, which goes back to the system as soon as it is freed.

    Freed and allocated again and again while layers are packed, heap memory would fragment and keep what it was given.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

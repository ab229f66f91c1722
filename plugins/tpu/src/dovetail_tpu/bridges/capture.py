"""Programs of torch_xla: a step is traced once by lazy tensors, compiled, and then run by its hash.

Lazy tensors trace anew for every step, which takes milliseconds. This does what torch_xla does for ``torch.compile``,
without that compiler: find out which buffers a trace reads and which it changes, and run what was compiled over the
buffers' present contents. It depends on private parts of torch_xla, whose version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.debug.metrics as met
from torch import Tensor
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from dovetail_tpu.bridges.protocol import State, Step
from dovetail_tpu.faults import compiling

XLAC = torch_xla._XLAC
Buffer = State | Tensor
"""What programs read and may change: a state; or an adopted tensor, in place."""


@dataclass(frozen=True, slots=True)
class Started:
    """A run of a program.

    Attributes:
        results: of the step.
        spent: what buffers held before, which the program takes over. Letting go of it waits until the program ends.
    """

    results: Sequence[Tensor]
    spent: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class CapturedProgram:
    """A compiled step, and what it reads. None among buffers is the packed input.

    Attributes:
        key: by which torch_xla finds what it compiled.
        inputs: of the program, in order.
        changed: buffers whose new contents are the program's first outputs.
        results: of the step: each is the place of an output, or a buffer that the step returned as it was.
        words: size of the packed input.
        alias_bytes: of buffers that are changed in place.
        temp_bytes: unknown, because torch_xla does not say.
    """

    key: Any
    inputs: Sequence[Buffer | None]
    changed: Sequence[Buffer]
    results: Sequence[int | Buffer | None]
    words: int
    alias_bytes: int
    temp_bytes: int | None = None

    def run(self, packed_W: Tensor) -> Started:
        """Start the program over what its buffers hold now. It is never traced nor compiled again."""
        inputs = [packed_W if buffer is None else contents(buffer) for buffer in self.inputs]
        outputs = XLAC._run_cached_graph(self.key, inputs)
        spent = [_exchange(buffer, new) for buffer, new in zip(self.changed, outputs, strict=False)]
        results = [self._result(place, outputs, packed_W) for place in self.results]
        return Started(results, spent)

    def _result(self, place: int | Buffer | None, outputs: Sequence[Tensor], packed_W: Tensor) -> Tensor:
        if place is None:
            return packed_W
        return outputs[place] if isinstance(place, int) else contents(place)


def contents(buffer: Buffer) -> Tensor:
    """The tensor of torch_xla that a buffer is now."""
    return buffer.tensor if isinstance(buffer, State) else buffer


def _exchange(buffer: Buffer, new: Tensor) -> Tensor:
    """Give a buffer new contents; returns the old ones."""
    old = contents(buffer)
    if isinstance(buffer, State):
        buffer.tensor = new
        return old
    copy = old.clone()  # of the same memory
    XLAC._replace_xla_tensor(old, new)
    return copy


def capture(step: Step, words: int, buffers: Sequence[Buffer], device_kind: str) -> CapturedProgram:
    """Trace and compile a step. Nothing is run, and buffers keep their contents.

    Args:
        step: the program's body.
        words: size of the packed input.
        buffers: all that there are. Which of them the step uses is found out.
        device_kind: JAX's name of the device.

    Raises:
        ConfigError: XLA does not compile it.
        RuntimeError: the step needs to know values while it is traced, uses what torch_xla has no operation for, or
            XLA would copy a buffer to change it.
    """
    device = torch_xla.device()
    packed_W = torch.zeros(words, dtype=torch.int32).to(device)
    torch_xla.sync()  # gives buffers the numbers by which the trace knows them
    known: dict[int, Buffer | None] = {XLAC._xla_get_tensor_id(contents(buffer)): buffer for buffer in buffers}
    known[XLAC._xla_get_tensor_id(packed_W)] = None
    with _kept(buffers) as before:
        outputs = _traced(step, packed_W)
        is_new = _pending([contents(buffer) for buffer in buffers])
        changed = [
            buffer
            for buffer, tensor, new in zip(buffers, before, is_new, strict=True)
            if new or contents(buffer) is not tensor
        ]
        return _compiled(outputs, changed, known, words, device_kind)


@contextmanager
def _kept(buffers: Sequence[Buffer]) -> Iterator[Sequence[Tensor]]:
    """Give the contents of buffers, and put them back at the end, whatever was recorded about them meanwhile."""
    before = [contents(buffer) for buffer in buffers]
    saved = [tensor.clone() for tensor in before]  # of the same memory
    try:
        yield before
    finally:
        for buffer, tensor in zip(buffers, before, strict=True):
            if isinstance(buffer, State):
                buffer.tensor = tensor
        for tensor, copy, is_new in zip(before, saved, _pending(before), strict=True):
            if is_new:
                XLAC._replace_xla_tensor(tensor, copy)
        XLAC._clear_pending_irs(str(torch_xla.device()))


def _traced(step: Step, packed_W: Tensor) -> list[Tensor]:
    fallbacks = _fallbacks()
    XLAC._set_allow_execution(False)
    try:
        outputs = [output.to(packed_W.device) for output in step(packed_W)]
    except RuntimeError as error:
        if "Unexpected execution" not in str(error):
            raise
        raise RuntimeError("A step needs to know values of tensors while it is traced, before it runs.") from error
    finally:
        XLAC._set_allow_execution(True)
    missing = sorted(name for name, count in _fallbacks().items() if count != fallbacks.get(name, 0))
    if missing:
        raise RuntimeError(f"A step uses {', '.join(missing)}, which torch_xla {torch_xla.__version__} lacks.")
    return outputs


def _fallbacks() -> dict[str, int]:
    """How often each operation ran on the host for want of one on the chip."""
    return {name: met.counter_value(name) for name in met.executed_fallback_ops()}


def _pending(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each is to be computed yet."""
    pending: list[bool] = XLAC._check_tensor_need_materialization(list(tensors))
    return pending


def _compiled(
    outputs: Sequence[Tensor],
    changed: Sequence[Buffer],
    known: Mapping[int, Buffer | None],
    words: int,
    device_kind: str,
) -> CapturedProgram:
    roots, places = _roots([*map(contents, changed), *outputs], known)
    numbers, values = XLAC._get_tensors_xla_device_data_node(roots)
    inputs = [known.get(number, value) for number, value in zip(numbers, values, strict=True)]
    wanted = {id(buffer) for buffer in changed}
    donors = [value for buffer, value in zip(inputs, values, strict=True) if id(buffer) in wanted]
    key = _compile(roots, donors, device_kind)
    alias_bytes = sum(donor.nbytes for donor in donors)
    return CapturedProgram(key, inputs, changed, places[len(changed) :], words, alias_bytes)


def _roots(
    tensors: Sequence[Tensor], known: Mapping[int, Buffer | None]
) -> tuple[list[Tensor], list[int | Buffer | None]]:
    """What a program has to compute, each once; and for each tensor its place there, or the buffer that it is."""
    roots: dict[str, Tensor] = {}
    places: list[int | Buffer | None] = []
    for tensor, is_computed in zip(tensors, _pending(tensors), strict=True):
        if is_computed:
            name = XLAC._unique_id_for_ir_and_data(tensor)
            roots.setdefault(name, tensor)
            places.append(list(roots).index(name))
        else:
            places.append(known.get(XLAC._xla_get_tensor_id(tensor), tensor))
    return list(roots.values()), places


def _compile(roots: Sequence[Tensor], donors: Sequence[Tensor], device_kind: str) -> Any:
    """The key of a program that computes ``roots`` and may take the memory of ``donors`` for it."""
    for donor in donors:
        XLAC._set_buffer_donation(donor, True)
    try:
        with alias_with_buffer_donor_config():
            compiled, aliased = _count("CompileTime", 0), _count("InputOutputAliasCount", 1)
            key = XLAC._get_graph_hash(roots)
            with compiling(device_kind, "A step"):
                XLAC._xla_warm_up_cache(roots, [])
            if _count("CompileTime", 0) > compiled:  # else the same program was compiled before
                aliased = int(_count("InputOutputAliasCount", 1) - aliased)
                if aliased != len(donors):
                    raise RuntimeError(f"XLA changes {aliased} of {len(donors)} buffers in place, and copies others.")
    finally:
        for donor in donors:
            XLAC._set_buffer_donation(donor, False)
    return key


def _count(metric: str, field: int) -> float:
    """Number of samples of a metric (field 0), or their sum (1)."""
    data = met.metric_data(metric)
    return data[field] if data else 0

"""Held to its word: what a platform and an attention backend claim, tried at load on inputs of a few tokens.

A wrong kernel gives wrong text, not an error; a user would look for the fault in the model. So every start runs each
kind of attention layer once, beside the reference operations in float32, and compares what the manifests say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dovetail.config import EngineConfig, Selection
from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache, Metadata, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, ShapePolicy
from dovetail.errors import PluginLoadError
from dovetail.ops import reference
from dovetail.runner.kv_memory import groups_of
from dovetail.runner.tiny_batch import TinyBatch, TinyStep

WINDOW, SOFT_CAP = 8, 2.0
"""Put in the place of a layer's own, so that a few tokens suffice to feel them."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest error, as a share of the largest value. A platform may compute products of float32 in less."""
NARROW_TOLERANCE = 0.2
"""For caches of one byte per element."""
PAGE_TOLERANCE = 0.02
NUM_BLOCKS = 8
Layer = tuple[KVCache, Metadata, AttentionSpec]
Entry = Callable[[AttentionBackend, StepTensors, Sequence[Tensor], Layer, TinyBatch], Tensor]
"""One of the two methods by which a layer attends."""

_logger = logging.getLogger("dovetail.self_check")


@torch.inference_mode()
def checked_ops(part: Selection, platform: Platform, dtype: torch.dtype) -> OpTable:
    """A platform's operations, compared with its manifest, and the simple ones with the reference.

    Raises:
        PluginLoadError: they differ; says what was claimed, what came out, and what to do.
    """
    overrides = platform.ops(dtype)
    ops = OpTable.resolve(overrides, owner=f"platform {part.name!r} of {part.owner}")
    claimed = part.claims
    if claimed and platform.device.type != claimed["device_type"]:
        raise lie(part, "--platform", f"claims device type {claimed['device_type']!r}, and runs on {platform.device}")
    if claimed:
        _check_claimed_ops(part, platform, set(overrides), set(claimed["ops"]))
    trials = [_Trial(name, overrides, platform.device, dtype) for name in sorted(set(overrides) & set(_EXAMPLES))]
    platform.prepare(lambda: [trial.run() for trial in trials])
    for trial in trials:
        problem = trial.problem()
        if problem:
            raise lie(part, "--platform", f"claims operation {trial.name!r} for {_name(dtype)}, but {problem}")
    return ops


def _check_claimed_ops(part: Selection, platform: Platform, given: set[str], claimed: set[str]) -> None:
    undeclared = given - claimed
    if undeclared:
        raise lie(part, "--platform", f"overrides {', '.join(sorted(undeclared))}, which its manifest does not claim")
    ever = set(given)
    if claimed - given:
        ever.update(*(platform.ops(getattr(torch, name)) for name in part.claims["dtypes"]))
    missing = ", ".join(sorted(claimed - ever))
    if missing and ever:
        raise lie(part, "--platform", f"claims {missing}, and overrides them for none of its dtypes")
    if missing:
        _logger.warning("%s overrides no operation on this machine; %s run on the reference.", part.owner, missing)


@torch.inference_mode()
def check_attention(
    config: EngineConfig,
    platform: Platform,
    shapes: ShapePolicy,
    backend: AttentionBackend,
    specs: Sequence[AttentionSpec],
) -> None:
    """Run each kind of layer on a ragged batch: a prompt's later chunk, a decode, drafts to verify, a whole prompt.

    A backend that prepares projections itself runs it a second time, from projections.

    Args:
        shapes: of the platform.
        specs: one per layer.

    Raises:
        PluginLoadError: a result is of the wrong shape, not finite, or wrong; or pages have another size than claimed.
    """
    part = config.attention
    groups = groups_of(specs)
    batch = TinyBatch(
        block_size=config.block_size,
        max_requests=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_len=config.max_model_len,
        num_groups=len(groups),
        device=platform.device,
        dtype=getattr(torch, config.dtype),
        kv_dtype=getattr(torch, config.kv_dtype),
    )
    group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
    prepares = type(backend).forward_projected is not AttentionBackend.forward_projected
    entries = [_plain, _projected] if prepares else [_plain]
    kinds = list(dict.fromkeys((spec, group_of[layer]) for layer, spec in enumerate(specs)))
    for spec, _ in kinds:
        _check_pages(part, backend, spec)
    runs = [
        _Attending(backend, entry, spec, number, backend.allocate(spec, batch.num_blocks), shapes, batch)
        for spec, number in ((_felt(spec), number) for spec, number in kinds)
        for entry in entries
    ]
    platform.prepare(lambda: [run.step(step) for run in runs for step in batch.steps()])
    for run in runs:
        problem, spec = run.problem(), run.spec
        if problem:
            raise lie(part, "--attention", f"claims {_capabilities(spec, batch.kv_dtype)}, but {problem}")


def _felt(spec: AttentionSpec) -> AttentionSpec:
    """The same kind of layer, with a window and a cap that a few tokens reach."""
    window = None if spec.window is None else min(spec.window, WINDOW)
    return replace(spec, window=window, soft_cap=None if spec.soft_cap is None else SOFT_CAP)


def _plain(
    backend: AttentionBackend, tables: StepTensors, qkv: Sequence[Tensor], layer: Layer, batch: TinyBatch
) -> Tensor:
    return backend.forward(qkv[0], qkv[1], qkv[2], *layer)


def _projected(
    backend: AttentionBackend, tables: StepTensors, qkv: Sequence[Tensor], layer: Layer, batch: TinyBatch
) -> Tensor:
    qkv_TE = torch.cat(list(qkv), dim=1).flatten(1)
    return backend.forward_projected(qkv_TE, tables.positions_T, batch.rotation(layer[2].head_size), *layer)


@dataclass(frozen=True, slots=True)
class _Attending:
    """One kind of layer, attending through one method."""

    backend: AttentionBackend
    entry: Entry
    spec: AttentionSpec
    group: int
    cache: KVCache
    shapes: ShapePolicy
    batch: TinyBatch

    def step(self, step: TinyStep) -> Tensor:
        """Its output for one step, padding included."""
        tables = self.batch.tensors(step, self.shapes)
        padding = len(tables.token_ids_T) - step.num_tokens
        qkv = [self.batch.on_device(x, padding) for x in self.batch.inputs(self.spec, step)]
        layer = self.cache, self.backend.build_metadata(tables, self.group), self.spec
        return self.entry(self.backend, tables, qkv, layer, self.batch)

    def problem(self) -> str:
        """What is wrong with its outputs; empty if nothing is."""
        batch, spec = self.batch, self.spec
        k_cache, v_cache = batch.reference_cache(spec)
        for step in batch.steps():
            out = self.step(step)
            q, k, v = batch.inputs(spec, step)
            if self.entry is _projected:
                q, k = batch.turned(step, q), batch.turned(step, k)
            reference.write_kv(batch.stored(k), batch.stored(v), k_cache, v_cache, step.slots_T)
            if not step.judged:
                continue
            starts, lengths, table_RB = step.starts, step.lengths, batch.table_RB[step.requests]
            want = reference.paged_attention(
                q, k_cache, v_cache, table_RB, starts, lengths, spec.scale, spec.window, spec.soft_cap
            )
            rows = self.shapes.fit(step.num_tokens, len(step.requests)).num_tokens
            problem = _difference(out, want, rows, step, batch)
            if problem:
                return problem
        return ""


def _difference(out: Tensor, want: Tensor, rows: int, step: TinyStep, batch: TinyBatch) -> str:
    """How one step's output differs from what it should be, padding aside; empty if it does not."""
    shape = [rows, want.shape[1]]
    if list(out.shape) != shape or out.dtype != batch.dtype:
        return f"returns {_name(out.dtype)} {list(out.shape)} instead of {_name(batch.dtype)} {shape}"
    got = out.detach().to("cpu", torch.float32)
    if not got.isfinite().all():
        return "its output is not finite"
    allowed = batch.tolerance(TOLERANCE, NARROW_TOLERANCE)
    error_T = (got[: step.num_tokens] - want).abs().amax(1) / want.abs().max()
    worst = int(error_T.argmax())
    if error_T[worst] <= allowed:
        return ""
    return f"its output for {step.label(worst)} is off by {float(error_T[worst]):.2g} where {allowed:.2g} is allowed"


def _check_pages(part: Selection, backend: AttentionBackend, spec: AttentionSpec) -> None:
    """Compare ``page_bytes`` with what twice as many blocks take more, where the cache shows its tensors."""
    few, many = (_tensor_bytes(backend.allocate(spec, count)) for count in (NUM_BLOCKS, 2 * NUM_BLOCKS))
    real, claimed = (many - few) / NUM_BLOCKS, backend.page_bytes(spec)
    if few and abs(real - claimed) > PAGE_TOLERANCE * claimed:
        raise lie(part, "--attention", f"claims {claimed} bytes per page, and allocates {real:.0f}")


def _tensor_bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache; memory that several of them show counts once."""
    storages: dict[int, tuple[int, int]] = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        identity = storage._cdata  # an accelerator's storage need not have an address
        shown, _ = storages.get(identity, (0, 0))
        storages[identity] = (shown + tensor.nbytes, storage.nbytes())
    return sum(min(shown, whole) for shown, whole in storages.values())


def _tensors(value: Any) -> list[Tensor]:
    """Those that a value holds directly, or in containers, dataclasses and plain attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        held: list[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        held = list(value)
    elif is_dataclass(value):
        held = [getattr(value, field.name) for field in fields(value)]
    else:
        names = [*getattr(value, "__slots__", ()), *getattr(value, "__dict__", {})]
        held = [x for x in (getattr(value, name, None) for name in names) if isinstance(x, Tensor | list | tuple)]
    return [tensor for item in held for tensor in _tensors(item)]


def _capabilities(spec: AttentionSpec, kv_dtype: torch.dtype) -> str:
    extra = [name for name in ("window", "soft_cap") if getattr(spec, name) is not None]
    kinds = "".join(f" and {name}" for name in extra)
    return f"head size {spec.head_size}{kinds} with a KV cache of {_name(kv_dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lie(part: Selection, option: str, what: str) -> PluginLoadError:
    """That a part does not do what it claims, in words.

    Args:
        option: by which another part is chosen.
        what: a verb and what follows it.
    """
    return PluginLoadError(
        f"The self-check of {part.name!r} of {part.owner} failed: it {what}. Choose another {option}, and report this "
        f"to the authors of {part.distribution}."
    )


class _Trial:
    """An override on a small example, beside the reference."""

    def __init__(self, name: str, overrides: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.name = name
        self._overrides = overrides
        self._dtype = dtype
        self._given = [_cast(value, dtype) for value in _EXAMPLES[name](torch.Generator().manual_seed(0))]
        self._inputs = [value.to(device) if isinstance(value, Tensor) else value for value in self._given]

    def run(self) -> tuple[Tensor, ...]:
        """What it returns."""
        inputs = list(self._inputs)
        if self.name == "linear":
            inputs[1] = self._overrides.get("linear_pack", reference.linear_pack)(inputs[1])
        return _tuple(self._overrides[self.name](*inputs))

    def problem(self) -> str:
        """How that differs from the reference; empty if it does not."""
        want = _tuple(getattr(reference, self.name)(*(_cast(value, torch.float32) for value in self._given)))
        got = self.run()
        if [tuple(x.shape) for x in got] != [tuple(x.shape) for x in want]:
            return f"returns shapes {[list(x.shape) for x in got]} instead of {[list(x.shape) for x in want]}"
        allowed = TOLERANCE.get(self._dtype, NARROW_TOLERANCE)
        for mine, right in zip(got, want, strict=True):
            error = (mine.detach().to("cpu", torch.float32) - right).abs().max() / right.abs().max()
            if not error <= allowed:
                return f"its result is off by {float(error):.2g} where {allowed:.2g} is allowed"
        return ""


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Activations in ``dtype``; integers and tables of angles (float64 here) keep theirs."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.float() if value.dtype is torch.float64 else value.to(dtype)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _angles(generator: torch.Generator) -> Tensor:
    angles_PK = torch.rand((16, 16), generator=generator, dtype=torch.float64) * 6
    return torch.cat([angles_PK.cos(), angles_PK.sin()], dim=1)


_EXAMPLES: dict[str, Callable[[torch.Generator], tuple[Any, ...]]] = {
    "rms_norm": lambda g: (_normal(g, 5, 64), _normal(g, 64), 1e-5),
    "add_rms_norm": lambda g: (_normal(g, 5, 64), _normal(g, 5, 64), _normal(g, 64), 1e-5),
    "rotary": lambda g: (_normal(g, 5, 4, 32), _normal(g, 5, 2, 32), torch.tensor([0, 3, 15, 7, 1]), _angles(g)),
    "silu_and_mul": lambda g: (_normal(g, 5, 128),),
    "gelu_tanh_and_mul": lambda g: (_normal(g, 5, 128),),
    "linear": lambda g: (_normal(g, 5, 64), _normal(g, 48, 64), _normal(g, 48)),
}
"""Arguments of operations that take nothing but activations and weights; conformance suites try all of them."""

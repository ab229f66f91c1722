"""Attention over a paged cache on the chip: in Pallas, and in plain XLA to compare it with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jax import Array, lax
from torch import Tensor
from torch.nn.functional import pad

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, Preparation, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.ops import reference
from dovetail_tpu import bridges
from dovetail_tpu.bridges.protocol import State
from dovetail_tpu.kernels.block_sizes import AttentionShape, Blocks, Case, attention_blocks
from dovetail_tpu.kernels.chip import V5E, chip_of_kind
from dovetail_tpu.kernels.gather_attention import gather_attention
from dovetail_tpu.kernels.kv_write import kv_scatter, kv_write
from dovetail_tpu.kernels.ragged_attention import ragged_attention
from dovetail_tpu.mesh import KV_SPEC, kv_shape, over_heads

DTYPES = (torch.bfloat16, torch.float32)
KV_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.int8)
FEWEST_TOKENS, FEWEST_REQUESTS, FEWEST_COLUMNS = 64, 8, 8
"""That a call outside of compiled steps is padded to at least. Above, there are few sizes: each is a program."""

Attend = Callable[..., tuple[Array, Array]]
"""``(q_THK, k_TNK, v_TNK, kv_X2NK, *tables) -> (out_THK, kv_X2NK)``, with tables in the order of :class:`Tables`."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What layers of a KV group share: tables of :class:`StepTensors`."""

    table_RB: Tensor
    starts_R1: Tensor
    lengths_R: Tensor
    slots_T: Tensor


class TpuAttention(AttentionBackend):
    """Kernels in Pallas. Where programs execute on the host, they are interpreted: slowly."""

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        if dtype not in DTYPES or kv_dtype not in KV_DTYPES:
            raise ConfigError(
                f"Attention on the chip computes in {_names(DTYPES)} over caches of {_names(KV_DTYPES)}, not in "
                f"{_names([dtype])} over {_names([kv_dtype])}."
            )
        self._bridge = bridges.current()
        self._page = block_size
        self._dtype, self._kv_dtype = dtype, kv_dtype
        chip = chip_of_kind(self._bridge.device_kind)
        self._chip = chip or V5E  # any will do to execute on the host
        self._is_interpreted = chip is None

    def page_bytes(self, spec: AttentionSpec) -> int:
        """On all chips together, with what heads are padded by."""
        return math.prod(self._shape(spec, 1)) * self._kv_dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> State:
        """One buffer for keys and values."""
        placement = KV_SPEC if self._bridge.num_devices > 1 else ()
        return self._bridge.allocate(self._shape(spec, num_blocks), self._kv_dtype, placement)

    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        """The step's tables."""
        return Tables(step.block_tables[group], step.query_start_R1, step.seq_lens_R, step.slot_mapping[group])

    def forward(
        self, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, cache: State, metadata: Tables, spec: AttentionSpec
    ) -> Tensor:
        """Inside of a program a part of it, outside a program of its own, of a size that others can share."""
        inputs = [q_THK, k_TNK, v_TNK, metadata.table_RB, metadata.starts_R1, metadata.lengths_R, metadata.slots_T]
        is_outside = _is_outside(q_THK)
        if is_outside:
            inputs = _padded(*inputs)
        static = self._static(inputs[0], inputs[3], spec)
        (out_TE,) = self._bridge.apply(_attend, *inputs, states=[cache], **static)
        return out_TE[: len(q_THK)] if is_outside else out_TE

    def forward_projected(
        self,
        qkv_TE: Tensor,
        positions_T: Tensor,
        preparation: Preparation,
        cache: State,
        metadata: Tables,
        spec: AttentionSpec,
    ) -> Tensor:
        """On several devices, a program's projection holds each one's heads side by side: queries, keys, values."""
        devices = self._bridge.num_devices
        if devices == 1 or _is_outside(qkv_TE):
            return super().forward_projected(qkv_TE, positions_T, preparation, cache, metadata, spec)
        heads, kv_heads = spec.num_heads // devices, max(1, spec.num_kv_heads // devices)
        by_device_TDHK = qkv_TE.view(len(qkv_TE), devices, heads + 2 * kv_heads, spec.head_size)
        parts = by_device_TDHK.split_with_sizes([heads, kv_heads, kv_heads], 2)
        q_THK, k_TNK, v_TNK = (part_TDHK.flatten(1, 2) for part_TDHK in parts)
        if preparation.norm_weights_K is not None:  # by the reference, which XLA splits as the heads are
            q_weight_K, k_weight_K = preparation.norm_weights_K
            q_THK = reference.rms_norm(q_THK, q_weight_K, preparation.eps)
            k_TNK = reference.rms_norm(k_TNK, k_weight_K, preparation.eps)
        q_THK, k_TNK = reference.rotary(q_THK, k_TNK, positions_T, preparation.cos_sin_PK)
        return self.forward(q_THK, k_TNK, v_TNK, cache, metadata, spec)

    def _shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, int, int]:
        places, itemsize = num_blocks * self._page, self._kv_dtype.itemsize
        return kv_shape(self._bridge.num_devices, places, spec.num_kv_heads, spec.head_size, itemsize)

    def _static(self, q_THK: Tensor, table_RB: Tensor, spec: AttentionSpec) -> dict[str, Any]:
        devices = self._bridge.num_devices
        shape = AttentionShape(
            tokens=len(q_THK),
            requests=len(table_RB),
            columns=table_RB.shape[1],
            page=self._page,
            heads=spec.num_heads // devices,
            kv_heads=max(1, spec.num_kv_heads // devices),
            size=spec.head_size,
            itemsize=self._dtype.itemsize,
            kv_itemsize=self._kv_dtype.itemsize,
        )
        cases = [Case.DECODE, Case.MIXED] if shape.tokens <= shape.requests else [Case.PREFILL]
        if self._is_interpreted:
            cases = cases[-1:]  # the interpreter gains nothing by the other
        blocks = dict.fromkeys(attention_blocks(self._chip, case, shape) for case in cases)
        cuts = {"blocks": (*blocks,), "interpret": self._is_interpreted}
        return {"attend": _in_pallas, "spec": spec, "page": self._page, **cuts}


class TpuGatherAttention(TpuAttention):
    """The same in plain XLA, which gathers all pages of a request for each of its tokens."""

    def _static(self, q_THK: Tensor, table_RB: Tensor, spec: AttentionSpec) -> dict[str, Any]:
        return {"attend": _in_xla, "spec": spec, "page": self._page}


def _attend(
    kv_X2NK: Array, q_THK: Array, k_TNK: Array, v_TNK: Array, *tables: Array, attend: Attend, **static: Any
) -> tuple[Array, Array]:
    """Store, then attend: each device for its own heads."""
    spread = over_heads(functools.partial(attend, **static))
    out_THK, kv_X2NK = spread(q_THK, k_TNK, v_TNK, kv_X2NK, *tables)
    return kv_X2NK, out_THK.reshape(len(q_THK), -1)


def _in_pallas(
    q_THK: Array,
    k_TNK: Array,
    v_TNK: Array,
    kv_X2NK: Array,
    *tables: Array,
    spec: AttentionSpec,
    page: int,
    blocks: tuple[Blocks, ...],
    interpret: bool,
) -> tuple[Array, Array]:
    """By the kernels. Of two cuts, the first is for steps in which no request has more than a token."""
    *tables_RB, slots_T = tables
    kv_X2NK = kv_write(kv_X2NK, k_TNK, v_TNK, slots_T, page=page, interpret=interpret)
    layer = _layer(spec, k_TNK.shape[1], page)

    def by(cut: Blocks) -> Array:
        return ragged_attention(q_THK, kv_X2NK, *tables_RB, **layer, blocks=cut, interpret=interpret)

    if len(blocks) == 1:
        return by(blocks[0]), kv_X2NK
    starts_R1 = tables_RB[1]
    are_single = (starts_R1[1:] - starts_R1[:-1]).max() <= 1
    return lax.cond(are_single, lambda: by(blocks[0]), lambda: by(blocks[1])), kv_X2NK


def _in_xla(
    q_THK: Array, k_TNK: Array, v_TNK: Array, kv_X2NK: Array, *tables: Array, spec: AttentionSpec, page: int
) -> tuple[Array, Array]:
    *tables_RB, slots_T = tables
    kv_X2NK = kv_scatter(kv_X2NK, k_TNK, v_TNK, slots_T)
    return gather_attention(q_THK, kv_X2NK, *tables_RB, **_layer(spec, k_TNK.shape[1], page)), kv_X2NK


def _is_outside(tensor: Tensor) -> bool:
    """Of a program: among tensors of the host."""
    return tensor.device.type == "cpu"


def _layer(spec: AttentionSpec, kv_heads: int, page: int) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "kv_heads": kv_heads,
            "page": page,
            "scale": spec.scale,
            "window": spec.window,
            "soft_cap": spec.soft_cap,
        }
    )


def _padded(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    table_RB: Tensor,
    starts_R1: Tensor,
    lengths_R: Tensor,
    slots_T: Tensor,
) -> list[Tensor]:
    """With padding tokens and requests, and columns of the null block."""
    fewest = (FEWEST_TOKENS, FEWEST_REQUESTS, FEWEST_COLUMNS)
    sizes = (len(q_THK), *table_RB.shape)
    more_T, more_R, more_B = (_rung(size, least) - size for size, least in zip(sizes, fewest, strict=True))
    heads = (pad(x_THK, (0, 0, 0, 0, 0, more_T)) for x_THK in (q_THK, k_TNK, v_TNK))
    starts_R1 = torch.cat([starts_R1, starts_R1[-1:].expand(more_R)])
    return [
        *heads,
        pad(table_RB, (0, more_B, 0, more_R)),
        starts_R1,
        pad(lengths_R, (0, more_R)),
        pad(slots_T, (0, more_T)),
    ]


def _rung(size: int, fewest: int) -> int:
    """The next of ``fewest × 4^n``."""
    while fewest < size:
        fewest *= 4
    return fewest


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

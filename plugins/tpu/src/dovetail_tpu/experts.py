"""Mixtures of experts for the op table: torch's tensors in and out, kernels in between."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from dovetail.ops import reference
from dovetail_tpu import bridges
from dovetail_tpu.calls import chip
from dovetail_tpu.kernels.chip import Chip
from dovetail_tpu.kernels.grouped_matmul import Plan, plan_groups, tiles_product
from dovetail_tpu.kernels.product_tiles import expert_rows
from dovetail_tpu.kernels.quantized_matmul import Weight
from dovetail_tpu.mesh import over_inner


def choose_experts(logits_TE: Tensor, num_active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The reference, whose ids are 64 bits wide on every bridge."""
    ids_TA, weights_TA = reference.choose_experts(logits_TE, num_active, normalize)
    return ids_TA.to(torch.int64), weights_TA


def experts_pack(weight_EOI: Tensor) -> Tensor:
    """The weights as they are."""
    return weight_EOI.contiguous()


def moe_experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, expert_ids_TA: Tensor, expert_weights_TA: Tensor
) -> Tensor:
    """See :func:`dovetail.ops.reference.moe_experts`."""
    tensors = x_TD, gate_up_EFD, down_EDF, expert_ids_TA, expert_weights_TA
    (out_TD,) = bridges.current().apply(_moe_experts, *tensors, chip=chip())
    return out_TD


def _moe_experts(*arrays: Array, chip: Chip | None) -> tuple[Array]:
    return (over_inner(partial(mixture, chip=chip))(*arrays),)


def mixture(
    x_TD: Array, gate_up_EFD: Array, down_EDF: Array, ids_TA: Array, weights_TA: Array, *, chip: Chip | None
) -> Array:
    """Pairs of a token and one of its experts, sorted by expert, go through both products; a token's are summed."""
    with jax.enable_x64(False):
        tokens, active = ids_TA.shape
        if not tokens:
            return x_TD
        num_experts = len(gate_up_EFD)
        ids_N = ids_TA.astype(jnp.int32).reshape(-1)
        ids_N = jnp.where((ids_N >= 0) & (ids_N < num_experts), ids_N, num_experts)
        order_N = jnp.argsort(ids_N, stable=True).astype(jnp.int32)
        starts_E1 = jnp.searchsorted(ids_N[order_N], jnp.arange(num_experts + 1, dtype=jnp.int32))
        plan = plan_groups(starts_E1, tokens * active, expert_rows(tokens * active, num_experts))
        y_MD = _gated(x_TD[order_N[plan.row_M] // active], gate_up_EFD, down_EDF, plan, chip)
        y_ND = jnp.where(plan.has_expert_N[:, None], y_MD[plan.place_N], jnp.zeros((), y_MD.dtype))
        y_TAD = jnp.zeros_like(y_ND).at[order_N].set(y_ND).reshape(tokens, active, -1)
        out_TD = (y_TAD.astype(jnp.float32) * weights_TA.astype(jnp.float32)[:, :, None]).sum(1)
        return out_TD.astype(x_TD.dtype)


def _gated(x_MD: Array, gate_up_EFD: Array, down_EDF: Array, plan: Plan, chip: Chip | None) -> Array:
    """``[M, D]``: rows in tiles through their experts."""
    product = partial(tiles_product, plan=plan, out_dtype=x_MD.dtype, chip=chip, interpret=chip is None)
    gate_up_MF = product(x_MD, Weight(gate_up_EFD, None, None, gate_up_EFD.shape[2])).astype(jnp.float32)
    gate_MF, up_MF = jnp.split(gate_up_MF, 2, axis=1)
    inner_MF = (jax.nn.silu(gate_MF) * up_MF).astype(x_MD.dtype)
    return product(inner_MF, Weight(down_EDF, None, None, down_EDF.shape[2]))

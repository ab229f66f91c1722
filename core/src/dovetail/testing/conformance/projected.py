"""Projections that are still to be prepared: what a layer asks of them, and what comes out in plain operations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dovetail.contracts.attention import AttentionSpec, Preparation
from dovetail.contracts.ops import OpTable
from dovetail.testing.conformance.paged_batch import Request

POSITIONS = 256
EPS = 0.5
"""Large enough to be felt."""


@dataclass(frozen=True, slots=True)
class Style:
    """What a family of models does before attention.

    Attributes:
        norms: whether queries and keys are normalised.
        wide_weights: the norms' weights are float32 whatever the activations are.
        turned: share of each head's elements that is rotated.
    """

    norms: bool = False
    wide_weights: bool = False
    turned: float = 1.0


STYLES = {
    "rotation": Style(),
    "norms": Style(norms=True),
    "norms with float32 weights": Style(norms=True, wide_weights=True),
    "half of each head": Style(turned=0.5),
    "norms, half of each head": Style(norms=True, turned=0.5),
}


def preparation(
    style: Style, spec: AttentionSpec, dtype: torch.dtype, device: torch.device, ops: OpTable
) -> Preparation:
    """Tables and weights of a style, the same on every device."""
    generator = torch.Generator().manual_seed(7)
    pairs = max(1, int(spec.head_size * style.turned) // 2)
    angles_PK = torch.arange(POSITIONS).unsqueeze(1) / 100.0 ** (torch.arange(pairs) / pairs)
    weights = [1 + 0.3 * torch.randn(spec.head_size, generator=generator) for _ in range(2)]
    q_weight_K, k_weight_K = (x.to(device, torch.float32 if style.wide_weights else dtype) for x in weights)
    return Preparation(
        cos_sin_PK=torch.cat([angles_PK.cos(), angles_PK.sin()], dim=1).to(device),
        norm_weights_K=(q_weight_K, k_weight_K) if style.norms else None,
        eps=EPS,
        ops=ops,
    )


def prepared(request: Request, style: Style, spec: AttentionSpec) -> Request:
    """The request with the queries and keys that attention reads: by the reference operations, on the host."""
    dtype = request.q_LHK.dtype
    on_host = preparation(style, spec, dtype, torch.device("cpu"), OpTable())
    qkv_LE = torch.cat([request.q_LHK, request.k_LNK, request.v_LNK], dim=1).flatten(1)
    q_LHK, k_LNK, v_LNK = on_host.heads(qkv_LE, torch.arange(len(request)), spec)
    return replace(request, q_LHK=q_LHK, k_LNK=k_LNK, v_LNK=v_LNK)

"""The experts of a mixture, in any number format.

A: experts of one token, E: experts, N: pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import PackedExperts
from dovetail.contracts.quant import PackedLinear, QuantMethod
from dovetail.layers.block import Block
from dovetail.layers.linear import Unquantized


class ExpertsLinear(Block):
    """One projection of all experts.

    To the loader it is one merged layer, whose shards are ``"0.gate"``, ``"0.up"``, ``"1.gate"``, and so on.

    Args:
        context: what the model is built with.
        quant: the number format.
        num_experts: E.
        in_features: of each expert.
        outputs: output features of each part of one expert, in order, e.g. ``{"gate": f, "up": f}``.

    Attributes:
        quant: the number format.
        stacked: once loaded, what the platform's operation for all experts reads; None unless the weights are plain.
    """

    def __init__(
        self,
        context: ModelContext,
        quant: QuantMethod,
        num_experts: int,
        in_features: int,
        outputs: Mapping[str, int],
    ) -> None:
        shards = {f"{expert}.{part}": size for expert in range(num_experts) for part, size in outputs.items()}
        super().__init__(context.device, quant.tensors(in_features, sum(shards.values()), context.dtype), shards)
        self.stacked: PackedExperts = None
        self._num_experts = num_experts
        self.quant = quant
        self._ops = context.ops
        self._dtype = context.dtype
        self._packed: PackedLinear = None

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Pack the weights: plain ones for the platform's operation, others in their format's way."""
        if is_plain(self.quant):
            weight_OI = tensors["weight"]
            self.stacked = self._ops.experts_pack(weight_OI.view(self._num_experts, -1, weight_OI.shape[1]))
            return
        experts = (
            {suffix: self._part(expert, suffix, tensor) for suffix, tensor in tensors.items()}
            for expert in range(self._num_experts)
        )
        self._packed = self.quant.prepare_experts(experts, self._ops, self._dtype)

    def _part(self, expert: int, suffix: str, tensor: Tensor) -> Tensor:
        """One expert's part of a tensor that all experts' outputs lie in side by side."""
        dim = self.specs[suffix].output_dim
        if dim is None:
            return tensor
        size = tensor.shape[dim] // self._num_experts
        return tensor.narrow(dim, expert * size, size).contiguous()

    def products(self, x_NI: Tensor, starts_E1: Tensor) -> Tensor:
        """``[N, O]`` of rows sorted by expert, unless the weights are plain; see ``QuantMethod.apply_experts``."""
        return self.quant.apply_experts(x_NI, self._packed, starts_E1, self._ops)


class Experts(nn.Module):
    """Gated feed-forward blocks, each for the tokens that chose it.

    Args:
        context: what the model is built with.
        name: dotted name of this module in the model, by which the number format decides whether it applies.
        num_experts: E.
        hidden_size, inner_size: of each expert.
    """

    def __init__(self, context: ModelContext, name: str, num_experts: int, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        quant = context.quant if context.quant.applies_to(name) else Unquantized()
        gate_up = {"gate": inner_size, "up": inner_size}
        self.gate_up = ExpertsLinear(context, quant, num_experts, hidden_size, gate_up)
        self.down = ExpertsLinear(context, quant, num_experts, inner_size, {"down": hidden_size})
        self._plain = is_plain(quant)
        self._num_experts = num_experts
        self._ops = context.ops

    def forward(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """``[T, D]``: the sum of each token's experts ``ids``, by their ``weights``."""
        if self._plain:
            return self._ops.moe_experts(x_TD, self.gate_up.stacked, self.down.stacked, ids_TA, weights_TA)
        return self._grouped(x_TD, ids_TA, weights_TA)

    def _grouped(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Sort the pairs by expert, multiply, and sum in the order of each token's choices."""
        ids_N, order_N = ids_TA.flatten().sort(stable=True)
        starts_E1 = torch.searchsorted(ids_N, torch.arange(self._num_experts + 1, device=ids_N.device))
        inner_NF = self._ops.silu_and_mul(self.gate_up.products(x_TD[order_N // ids_TA.shape[1]], starts_E1))
        y_ND = self.down.products(inner_NF, starts_E1)
        y_TAD = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(*ids_TA.shape, x_TD.shape[1])
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for choice in range(ids_TA.shape[1]):
            out_TD.addcmul_(y_TAD[:, choice].float(), weights_TA[:, choice, None])
        return out_TD.to(x_TD.dtype)


def is_plain(quant: QuantMethod) -> bool:
    """Whether weights stay plain, so that the platform's own operation computes all experts at once."""
    return type(quant) is Unquantized

"""Mixtures of experts as checkpoints describe them."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.contracts.model import ModelContext
from dovetail.layers.mlp import RoutedMLP
from dovetail_models.fields import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """The experts of a layer.

    Attributes:
        num_experts, num_active: of a layer, and of a token.
        inner_size: of each expert.
        normalize: whether the weights of a token's experts are scaled to sum to 1.
    """

    num_experts: int
    num_active: int
    inner_size: int
    normalize: bool

    def block(self, context: ModelContext, name: str, hidden_size: int) -> RoutedMLP:
        """The layer's router and experts."""
        return RoutedMLP(
            context,
            name,
            hidden_size,
            self.inner_size,
            num_experts=self.num_experts,
            num_active=self.num_active,
            normalize=self.normalize,
        )


def read_mixture(fields: Fields, *, num_experts: int, num_active: int, inner_size: int, normalize: bool) -> Mixture:
    """Parse ``num_experts_per_tok``, by default ``num_active``; the rest is spelt differently in every family.

    Raises:
        ConfigError: a token would need more experts than there are.
    """
    active = fields.integer("num_experts_per_tok", num_active)
    if active > num_experts:
        raise fields.bad("num_experts_per_tok", f"at most the number of experts, {num_experts}")
    return Mixture(num_experts=num_experts, num_active=active, inner_size=inner_size, normalize=normalize)

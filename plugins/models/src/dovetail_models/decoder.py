"""What the decoder families share: an embedding, layers in order, a final norm, and a head that may be tied.

A family's own file holds what is its own: how its config.json reads, and what one layer is made of.

T: tokens of the step, D: hidden size, S: rows that need logits, V: vocabulary, P: positions, K: rotary dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.layers.decoder import Decoder
from dovetail.layers.head import Head
from dovetail_models.rope import Rope

MERGED = (
    Rename("q_proj", "qkv_proj", "q"),
    Rename("k_proj", "qkv_proj", "k"),
    Rename("v_proj", "qkv_proj", "v"),
    Rename("gate_proj", "gate_up_proj", "gate"),
    Rename("up_proj", "gate_up_proj", "up"),
)
"""Projections that read the same input are merged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """What config.json says in every family.

    Attributes:
        attention, ropes: one per layer, in order.
        norm_eps, norm_offset: of every norm; the offset is added to the stored weights.
        tied: whether the head has no weights of its own.
        embedding_scale: factor on the embedding's rows.
        logit_soft_cap: bound of the logits, or None.
    """

    vocab_size: int
    hidden_size: int
    attention: tuple[AttentionSpec, ...]
    ropes: tuple[Rope, ...]
    norm_eps: float
    tied: bool
    dtype: torch.dtype
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None


C = TypeVar("C", bound=DecoderConfig)


class DecoderModel(Model, Generic[C]):
    """A family of decoders; ``C`` is what it reads from config.json.

    Attributes:
        renames: of the checkpoint's tensors.
        needs: what the family needs of other parts beyond its attention, by manifest field name.
    """

    renames: ClassVar[Sequence[Rename]] = MERGED
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abstractmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> C:
        """Read config.json.

        Raises:
            ConfigError: a field has a value that cannot be honoured.
        """
        ...

    @classmethod
    @abstractmethod
    def layer(cls, context: ModelContext, config: C, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """One layer, called as :class:`dovetail.layers.decoder.DecoderLayer` is; ``cos_sin_PK`` are its positions."""
        ...

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """What the resolver needs."""
        config = cls.parse(hf_config)
        return ModelFacts(
            attention=config.attention,
            vocab_size=config.vocab_size,
            max_positions=min(rope.max_positions for rope in config.ropes),
            dtype=config.dtype,
            needs=cls.needs,
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        config = self.parse(hf_config)
        tables = {id(rope): rope.table(context.max_model_len, context.device) for rope in config.ropes}
        layers = [self.layer(context, config, i, tables[id(rope)]) for i, rope in enumerate(config.ropes)]
        self.model = Decoder(
            context,
            layers,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
            embedding_scale=config.embedding_scale,
        )
        self.lm_head = Head(
            context,
            "lm_head",
            config.hidden_size,
            config.vocab_size,
            tied_to=self.model.embed_tokens if config.tied else None,
            soft_cap=config.logit_soft_cap,
        )
        self._tied = config.tied

    def weight_table(self) -> WeightTable:
        """The family's renames; a tied head reads the embedding's table."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self._tied else {}
        return WeightTable(renames=self.renames, ignore=("rotary_emb.inv_freq",), tied=tied)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm."""
        return self.model.forward(token_ids_T, positions_T, attend)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``."""
        return self.lm_head.forward(hidden_SD)

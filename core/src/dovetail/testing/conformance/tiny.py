"""A model small enough for any test, its checkpoint, and what it must answer, computed apart from it in float64.

Two layers of grouped-query attention, the first over a window, with rotary positions and a gated feed-forward part:
everything that an engine can get wrong changes its tokens. Tensor letters as in :mod:`dovetail.contracts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.config import EngineConfig, Selection
from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import Decoder, DecoderLayer
from dovetail.layers.head import Head
from dovetail.layers.mlp import GatedMLP
from dovetail.layers.rotary import frequencies, rotary_table
from dovetail.testing.conformance import checkpoints
from dovetail.testing.conformance.dense import attend
from dovetail.testing.engines import engine_config

VOCAB_SIZE = 128
HIDDEN_SIZE = 64
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
INNER_SIZE = 96
MAX_POSITIONS = 256
WINDOW = 24
ROTARY_BASE = 1000.0
EPS = 1e-6
CONFIG: Mapping[str, Any] = {"architectures": ["TinyForConformance"], "vocab_size": VOCAB_SIZE, "windows": [None, None]}
"""config.json; ``windows`` holds each layer's, and its length is the number of layers."""
WINDOWED: Mapping[str, Any] = {**CONFIG, "windows": [WINDOW, None]}
"""The same with a sliding window in the first layer, so that there are two KV groups."""


def spec(window: int | None) -> AttentionSpec:
    """Attention of one layer."""
    return AttentionSpec(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, scale=HEAD_SIZE**-0.5, window=window
    )


class TinyModel(Model):
    """The model itself, on any platform."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """Sizes are fixed; windows are the config's."""
        return ModelFacts(
            attention=[spec(window) for window in hf_config["windows"]],
            vocab_size=VOCAB_SIZE,
            max_positions=MAX_POSITIONS,
            dtype=torch.float32,
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        cos_sin_PK = rotary_table(frequencies(HEAD_SIZE, ROTARY_BASE), context.max_model_len, context.device)
        layers = [self._layer(context, i, window, cos_sin_PK) for i, window in enumerate(hf_config["windows"])]
        self.model = Decoder(context, layers, vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, norm_eps=EPS)
        self.lm_head = Head(context, "lm_head", HIDDEN_SIZE, VOCAB_SIZE)

    @staticmethod
    def _layer(context: ModelContext, index: int, window: int | None, cos_sin_PK: Tensor) -> DecoderLayer:
        name = f"model.layers.{index}"
        attention = SelfAttention(context, f"{name}.self_attn", index, spec(window), HIDDEN_SIZE, cos_sin_PK)
        mlp = GatedMLP(context, f"{name}.mlp", HIDDEN_SIZE, INNER_SIZE)
        return DecoderLayer(context, attention, mlp, hidden_size=HIDDEN_SIZE, norm_eps=EPS)

    def weight_table(self) -> WeightTable:
        """Projections that read the same input are merged."""
        qkv = [Rename(f"{part}_proj", "qkv_proj", part) for part in "qkv"]
        return WeightTable(renames=[*qkv, *(Rename(f"{part}_proj", "gate_up_proj", part) for part in ("gate", "up"))])

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm."""
        hidden_TD: Tensor = self.model(token_ids_T, positions_T, attend)
        return hidden_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``."""
        logits_SV: Tensor = self.lm_head(hidden_SD)
        return logits_SV


def weights(hf_config: Mapping[str, Any] = CONFIG) -> dict[str, Tensor]:
    """The checkpoint's float32 tensors by name: random, the same every time."""
    generator = torch.Generator().manual_seed(17)
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE), "lm_head.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    for i in range(len(hf_config["windows"])):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes[f"{attention}.q_proj.weight"] = (HEADS * HEAD_SIZE, HIDDEN_SIZE)
        shapes[f"{attention}.k_proj.weight"] = (KV_HEADS * HEAD_SIZE, HIDDEN_SIZE)
        shapes[f"{attention}.v_proj.weight"] = (KV_HEADS * HEAD_SIZE, HIDDEN_SIZE)
        shapes[f"{attention}.o_proj.weight"] = (HIDDEN_SIZE, HEADS * HEAD_SIZE)
        shapes[f"{mlp}.gate_proj.weight"] = (INNER_SIZE, HIDDEN_SIZE)
        shapes[f"{mlp}.up_proj.weight"] = (INNER_SIZE, HIDDEN_SIZE)
        shapes[f"{mlp}.down_proj.weight"] = (HIDDEN_SIZE, INNER_SIZE)
    made = {name: 2.5 * torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    norms = ["model.norm.weight"]
    for i in range(len(hf_config["windows"])):
        norms += [f"model.layers.{i}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    return made | {name: 1 + 0.2 * torch.randn(HIDDEN_SIZE, generator=generator) for name in norms}


def write_checkpoint(folder: Path, hf_config: Mapping[str, Any] = CONFIG, *, poisoned: int | None = None) -> Path:
    """Write config.json and model.safetensors into ``folder``, which is returned.

    Args:
        poisoned: a token whose embedding is NaN, so that whoever reads it gets logits that are not finite.
    """
    tensors = weights(hf_config)
    if poisoned is not None:
        tensors["model.embed_tokens.weight"][poisoned] = torch.nan
    return checkpoints.write_checkpoint(folder, hf_config, tensors)


def tiny_config(
    folder: Path,
    *,
    platform: Selection,
    attention: Selection,
    hf_config: Mapping[str, Any] = CONFIG,
    **changes: Any,
) -> EngineConfig:
    """What runs the checkpoint in ``folder``; ``changes`` are further fields of :class:`EngineConfig`."""
    here = "dovetail.testing.conformance.tiny:TinyModel"
    plain = "dovetail.layers.linear:Unquantized"
    parts = {
        name: Selection(name=name, target=target, distribution="dovetail-core", version="0", why="tested")
        for name, target in (("model", here), ("quant", plain))
    }
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 16,
        "num_threads": 1,
    }
    given = {**parts, "platform": platform, "attention": attention, **sizes, **changes}
    return engine_config(model_path=str(folder), model_name="tiny", hf_config=dict(hf_config), **given)


def dense_logits(token_ids: Sequence[int], hf_config: Mapping[str, Any] = CONFIG) -> Tensor:
    """Float64 logits ``[T, V]`` of a whole sequence: textbook matrices, without any code of the engine."""
    w = {name: tensor.double() for name, tensor in weights(hf_config).items()}
    x_TD = w["model.embed_tokens.weight"][list(token_ids)]
    for i, window in enumerate(hf_config["windows"]):
        layer = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items() if f".layers.{i}." in name}
        x_TD = x_TD + _dense_attention(_normed(x_TD, layer["input_layernorm.weight"]), layer, window)
        normed_TD = _normed(x_TD, layer["post_attention_layernorm.weight"])
        gate_TF = normed_TD @ layer["mlp.gate_proj.weight"].t()
        up_TF = normed_TD @ layer["mlp.up_proj.weight"].t()
        x_TD = x_TD + (gate_TF / (1 + torch.exp(-gate_TF)) * up_TF) @ layer["mlp.down_proj.weight"].t()
    return _normed(x_TD, w["model.norm.weight"]) @ w["lm_head.weight"].t()


def _normed(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D


def _dense_attention(x_TD: Tensor, layer: Mapping[str, Tensor], window: int | None) -> Tensor:
    length = len(x_TD)
    q_THK, k_TNK, v_TNK = (
        (x_TD @ layer[f"self_attn.{part}_proj.weight"].t()).view(length, -1, HEAD_SIZE) for part in "qkv"
    )
    positions_T = torch.arange(length, dtype=torch.float64)
    inverse_K = ROTARY_BASE ** (-torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE)
    turn_TK = torch.polar(torch.ones(length, HEAD_SIZE // 2, dtype=torch.float64), torch.outer(positions_T, inverse_K))
    q_THK, k_TNK = (_turned(x, turn_TK.unsqueeze(1)) for x in (q_THK, k_TNK))
    return attend(q_THK, k_TNK, v_TNK, spec(window)) @ layer["self_attn.o_proj.weight"].t()


def _turned(x: Tensor, turn_TK: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn_TK
    return torch.cat([turned.real, turned.imag], dim=-1)


def greedy(
    prompt: Sequence[int], count: int, hf_config: Mapping[str, Any] = CONFIG, *, margin: float = 0.0
) -> list[int]:
    """The ``count`` greedy tokens after a prompt, each from a new dense pass over everything before it.

    Args:
        margin: by how much the best logit must lead, so that rounding cannot decide.
    """
    tokens = list(prompt)
    for _ in range(count):
        best = dense_logits(tokens, hf_config)[-1].topk(2)
        assert float(best.values[0] - best.values[1]) > margin, "choose another prompt: rounding would decide"
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]

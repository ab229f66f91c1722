"""Routers and experts: loaded by shards, plain or in another number format, against sums written out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, TensorSpec
from dovetail.errors import ModelLoadError
from dovetail.layers.experts import Experts
from dovetail.layers.linear import Unquantized
from dovetail.layers.mlp import RoutedMLP
from dovetail.layers.router import Router
from dovetail.runner.loader import load_weights

E, D, F, ACTIVE = 5, 6, 8, 2


class Halved(Unquantized):
    """Weights are stored as halves, with a scale per output and one that all outputs share."""

    def applies_to(self, layer: str) -> bool:
        assert layer in ("mlp.experts", "mlp.gate"), layer
        return True

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        return {
            "halves": TensorSpec(shape=(in_features, out_features), dtype=torch.int32, output_dim=1),
            "scale": TensorSpec(shape=(out_features,), dtype=torch.float32),
            "factor": TensorSpec(shape=(1,), dtype=torch.float32, output_dim=None),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        factor = 0.5 * tensors["factor"]
        return ops.linear_pack((tensors["halves"].to(dtype) * factor * tensors["scale"]).t().contiguous())


class Mixture(Model):
    """One block alone."""

    def __init__(self, quant: QuantMethod, normalize: bool = True) -> None:
        context = ModelContext(
            ops=OpTable(), dtype=torch.float32, device=torch.device("cpu"), quant=quant, max_model_len=1
        )
        super().__init__({}, context)
        self.mlp = RoutedMLP(context, "mlp", D, F, num_experts=E, num_active=ACTIVE, normalize=normalize)

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        return ModelFacts(attention=(), vocab_size=1, max_positions=1, dtype=torch.float32)

    def weight_table(self) -> WeightTable:
        return WeightTable(
            renames=(
                Rename("moe.experts.*.w1", "mlp.experts.gate_up", "*.gate"),
                Rename("moe.experts.*.w3", "mlp.experts.gate_up", "*.up"),
                Rename("moe.experts.*.w2", "mlp.experts.down", "*.down"),
                Rename("moe.gate", "mlp.gate"),
            )
        )

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        raise AssertionError

    def logits(self, hidden_SD: Tensor) -> Tensor:
        raise AssertionError


def stored(halved: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {"moe.gate.weight": torch.randn(E, D, generator=generator)}
    for expert in range(E):
        for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
            key = f"moe.experts.{expert}.{name}"
            halves = torch.randint(-4, 5, shape, generator=generator, dtype=torch.int32)
            scale = torch.rand(shape[0], generator=generator) + 0.5
            tensors[f"{key}.weight"] = halves * 0.5 * scale[:, None]
            if halved:
                tensors[f"{key}.halves"], tensors[f"{key}.scale"] = halves.t().contiguous(), scale
                tensors[f"{key}.factor"] = torch.ones(1)
                del tensors[f"{key}.weight"]
    return tensors


def loaded(path: Path, model: Mixture, tensors: dict[str, Tensor]) -> Mixture:
    save_file(tensors, path / "model.safetensors")
    with torch.inference_mode():
        load_weights(model, path, Progress())
    return model


def expected(x_TD: Tensor, normalize: bool) -> Tensor:
    """Token by token, in float64."""
    weights = {name: tensor.double() for name, tensor in stored().items()}
    out = []
    for x in x_TD.double():
        probs = (weights["moe.gate.weight"] @ x).softmax(0)
        chosen = sorted(range(E), key=lambda expert: -float(probs[expert]))[:ACTIVE]
        total = sum(probs[expert] for expert in chosen) if normalize else 1
        terms = []
        for expert in chosen:
            w1, w2, w3 = (weights[f"moe.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            terms.append(probs[expert] / total * (w2 @ (nn.functional.silu(w1 @ x) * (w3 @ x))))
        out.append(sum(terms))
    return torch.stack(out)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("quant", [Unquantized(), Halved()], ids=["plain", "halved"])
def test_tokens_go_to_their_experts(tmp_path: Path, quant: QuantMethod, normalize: bool) -> None:
    model = loaded(tmp_path, Mixture(quant, normalize), stored(halved=isinstance(quant, Halved)))
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        out = model.mlp.forward(x)
        torch.testing.assert_close(out.double(), expected(x, normalize), rtol=1e-5, atol=1e-5)
        for count in (1, 2, 3, 17):
            torch.testing.assert_close(model.mlp.forward(x[:count]), out[:count], rtol=1e-5, atol=1e-6)
        assert model.mlp.forward(x[:0]).shape == (0, D)


@pytest.mark.parametrize(("num_experts", "num_active"), [(4, 2), (128, 8)])
def test_a_token_takes_the_same_route_in_any_batch(num_experts: int, num_active: int) -> None:
    """Bit for bit, as far as the linear layer keeps its rows apart."""
    context = ModelContext(
        ops=OpTable(linear=lambda x, weight, bias: x),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quant=Unquantized(),
        max_model_len=1,
    )
    router = Router(context, "gate", 1, num_experts=num_experts, num_active=num_active, normalize=True)
    x = torch.randn(150, num_experts, generator=torch.Generator().manual_seed(3))
    ids, weights = router.route(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(150))
    for count in (1, 2, 7, 64):
        for start in range(0, 150 - count, count):
            part = slice(start, start + count)
            alone = router.route(x[part])
            assert torch.equal(alone[0], ids[part])
            assert torch.equal(alone[1], weights[part])


def test_a_number_format_runs_once_per_expert_that_has_tokens(tmp_path: Path) -> None:
    rows: list[int] = []

    class Counting(Halved):
        def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
            rows.append(len(x_TI))
            return super().apply(x_TI, packed, bias_O, ops)

    model = loaded(tmp_path, Mixture(Counting()), stored(halved=True))
    with torch.inference_mode():
        model.mlp.forward(torch.randn(30, D))
        assert sum(rows) == 2 * 30 * ACTIVE
        assert len(rows) <= 2 * E
        rows.clear()
        model.mlp.forward(torch.randn(1, D))
        assert rows == [1] * 2 * ACTIVE


class Together(Halved):
    """Multiplies the rows of all experts in one operation."""

    def prepare_experts(
        self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable, dtype: torch.dtype
    ) -> PackedLinear:
        return torch.stack([self.prepare(tensors, ops, dtype) for tensors in experts])

    def apply_experts(self, x_NI: Tensor, packed: PackedLinear, starts_E1: Tensor, ops: OpTable) -> Tensor:
        rows_N = torch.arange(len(x_NI), device=x_NI.device)
        expert_N = torch.searchsorted(starts_E1, rows_N, right=True) - 1
        return torch.einsum("ni,noi->no", x_NI, packed[expert_N])


def test_a_number_format_may_multiply_all_experts_at_once(tmp_path: Path) -> None:
    model = loaded(tmp_path, Mixture(Together()), stored(halved=True))
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(model.mlp.forward(x).double(), expected(x, True), rtol=1e-5, atol=1e-5)
        assert model.mlp.forward(x[:0]).shape == (0, D)


def test_then_nothing_waits_for_the_device() -> None:
    """Tensors without values cannot be read."""
    context = ModelContext(
        ops=OpTable(), dtype=torch.float32, device=torch.device("meta"), quant=Together(), max_model_len=1
    )
    experts = Experts(context, "mlp.experts", E, D, F)
    for block in (experts.gate_up, experts.down):
        block.accept({suffix: torch.empty(spec.shape, device="meta") for suffix, spec in block.specs.items()})
    x, ids, weights = (torch.empty(7, size, device="meta") for size in (D, ACTIVE, ACTIVE))
    assert experts.forward(x, ids.long(), weights).shape == (7, D)


def test_missing_experts_are_named_as_the_checkpoint_names_them(tmp_path: Path) -> None:
    tensors = stored()
    for name in ("experts.3.w1", "experts.4.w2", "gate"):
        del tensors[f"moe.{name}.weight"]
    tensors["moe.experts.5.w1.weight"] = torch.zeros(F, D)
    tensors["moe.experts.0.w3.weight"] = torch.zeros(F, D + 1)
    with pytest.raises(ModelLoadError) as error:
        loaded(tmp_path, Mixture(Unquantized()), tensors)
    message = str(error.value)
    assert "3 missing" in message
    assert "moe.experts.3.w1.weight, moe.experts.4.w2.weight" in message
    assert "moe.gate.weight" in message
    assert "1 unexpected: moe.experts.5.w1.weight" in message
    assert (
        f"moe.experts.0.w3.weight (model.safetensors) has shape [{F}, {D + 1}], the model needs [{F}, {D}]" in message
    )

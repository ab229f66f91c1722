"""The suite of model families passes a sound one and catches broken ones, each by the scenario that it breaks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.contracts.model import ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.layers.head import Head
from dovetail.layers.linear import Unquantized
from dovetail.plugins.manifest import ModelManifest
from dovetail.testing.conformance import known_architectures, tiny, unregistered
from dovetail.testing.conformance.dense import DenseModel
from dovetail.testing.conformance.model import ModelSuite
from dovetail.testing.conformance.run import run

CONFIG = {**tiny.CONFIG, "windows": [6, None]}


class Sound(tiny.TinyModel):
    """The tiny model with a tied head, foreign spellings, and a careful reading of its config."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        windows = hf_config.get("windows")
        if not isinstance(windows, list) or not all(w is None or (isinstance(w, int) and w > 0) for w in windows):
            raise ConfigError(f"'windows' in config.json is {windows!r}; it must be a list of windows.")
        if hf_config.get("vocab_size") != tiny.VOCAB_SIZE:
            raise ConfigError(f"'vocab_size' in config.json is {hf_config.get('vocab_size')!r}, not {tiny.VOCAB_SIZE}.")
        return super().facts(hf_config)

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        tied_to = self.model.embed_tokens
        self.lm_head = Head(context, "lm_head", tiny.HIDDEN_SIZE, tiny.VOCAB_SIZE, tied_to=tied_to)

    def weight_table(self) -> WeightTable:
        tied = {"lm_head.weight": "model.embed_tokens.weight"}
        return replace(super().weight_table(), strip_prefixes=("text",), ignore=("inv_freq",), tied=tied)


def oracle(folder: Path, token_ids: Sequence[int]) -> Tensor:
    """The sound model."""
    cpu = torch.device("cpu")
    context = ModelContext(ops=OpTable(), dtype=torch.float32, device=cpu, quant=Unquantized(), max_model_len=96)
    return DenseModel(Sound, CONFIG, folder, context).logits(token_ids)


def suite(model: type) -> type[ModelSuite]:
    """The public form, for a class that no plugin registers."""
    manifest = ModelManifest(name="tiny", summary="For a test.", architectures=("TinyForConformance",))
    attributes = {"subject": unregistered(model, manifest), "hf_config": CONFIG, "reference": staticmethod(oracle)}
    return type("TestSubject", (ModelSuite,), attributes)


class EatsConfig(Sound):
    """model.1"""

    @classmethod
    def facts(cls, hf_config):
        hf_config["seen"] = True
        return super().facts(hf_config)


class BuildsAtDoublePrecision(Sound):
    """model.1"""

    def __init__(self, hf_config, context):
        torch.set_default_dtype(torch.float64)
        super().__init__(hf_config, context)


class NeedsEveryField(Sound):
    """model.2"""

    facts = tiny.TinyModel.facts


class NamesNoField(Sound):
    """model.3"""

    @classmethod
    def facts(cls, hf_config):
        try:
            return super().facts(hf_config)
        except ConfigError:
            raise ConfigError("bad configuration") from None


class SwapsLayers(Sound):
    """model.4"""

    def forward(self, token_ids_T, positions_T, attend):
        return super().forward(token_ids_T, positions_T, lambda layer, *qkv: attend(1 - layer, *qkv))


class PlainParameter(Sound):
    """model.5"""

    def __init__(self, hf_config, context):
        super().__init__(hf_config, context)
        self.extra = nn.Parameter(torch.zeros(3))


class IgnoresNorms(Sound):
    """model.6"""

    def weight_table(self):
        return replace(super().weight_table(), ignore=("norm",))


class SkipsLastNorm(Sound):
    """model.7"""

    def __init__(self, hf_config, context):
        super().__init__(hf_config, context)
        self.model._norm = lambda x, residual: (x + residual, None)


class AlwaysTies(Sound):
    """model.8"""

    def logits(self, hidden_SD):
        return F.linear(hidden_SD, self.model.embed_tokens._table_VD)


class StripsTwoDots(Sound):
    """model.9"""

    def weight_table(self):
        return replace(super().weight_table(), strip_prefixes=("text.",))


class WideLogits(Sound):
    """model.10"""

    def logits(self, hidden_SD):
        return super().logits(hidden_SD).float()


class LeaksTheFuture(Sound):
    """model.11"""

    def forward(self, token_ids_T, positions_T, attend):
        hidden_TD = super().forward(token_ids_T, positions_T, attend)
        return hidden_TD + 0.01 * hidden_TD.roll(-1, 0)


class CountsFromZero(Sound):
    """model.12"""

    def forward(self, token_ids_T, positions_T, attend):
        return super().forward(token_ids_T, torch.arange(len(positions_T)), attend)


class CountsFromTheFirstToken(Sound):
    """model.13"""

    def forward(self, token_ids_T, positions_T, attend):
        return super().forward(token_ids_T, positions_T[0] + torch.arange(len(positions_T)), attend)


class NormsOverTheStep(Sound):
    """model.14"""

    def forward(self, token_ids_T, positions_T, attend):
        hidden_TD = super().forward(token_ids_T, positions_T, attend)
        return hidden_TD / hidden_TD.square().mean().sqrt()


class NormsOverTheRows(Sound):
    """model.15"""

    def logits(self, hidden_SD):
        return super().logits(hidden_SD) / max(1, len(hidden_SD))


class Remembers(Sound):
    """model.16"""

    last = 0.0

    def forward(self, token_ids_T, positions_T, attend):
        hidden_TD = super().forward(token_ids_T, positions_T, attend)
        before, self.last = self.last, hidden_TD[-1].clone()
        return hidden_TD + 0.1 * before


class MovesPositions(Sound):
    """model.16"""

    def forward(self, token_ids_T, positions_T, attend):
        return super().forward(token_ids_T, positions_T.add_(1), attend)


class TableTooShort(Sound):
    """model.17"""

    def __init__(self, hf_config, context):
        super().__init__(hf_config, replace(context, max_model_len=context.max_model_len - 1))


class RoundsTwice(Sound):
    """model.18"""

    def forward(self, token_ids_T, positions_T, attend):
        return super().forward(token_ids_T, positions_T, attend) + 64 - 64


class TableOnTheHost(Sound):
    """model.19"""

    def __init__(self, hf_config, context):
        super().__init__(hf_config, context)
        self.table = torch.ones(tiny.MAX_POSITIONS, 1)

    def forward(self, token_ids_T, positions_T, attend):
        return super().forward(token_ids_T, positions_T, attend) * self.table[positions_T]


class ReadsBack(Sound):
    """model.19"""

    def forward(self, token_ids_T, positions_T, attend):
        assert int(positions_T.max()) < tiny.MAX_POSITIONS
        return super().forward(token_ids_T, positions_T, attend)


class MisnamesLayers(Sound):
    """model.20"""

    @staticmethod
    def _layer(context, index, window, cos_sin_PK):
        return tiny.TinyModel._layer(context, 0, window, cos_sin_PK)


class ReadsPackedWeights(Sound):
    """model.22"""

    def logits(self, hidden_SD):
        return F.linear(hidden_SD, self.lm_head._packed)


class OtherBranchForDecodes(Sound):
    """model.23"""

    def forward(self, token_ids_T, positions_T, attend):
        factor = 0.5 if len(token_ids_T) <= 3 and int(positions_T.max()) > 8 else 1.0
        return super().forward(token_ids_T, (positions_T * factor).long(), attend)


class WindowOffByOne(Sound):
    """model.24"""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        facts = super().facts(hf_config)
        return replace(facts, attention=[replace(s, window=s.window and s.window + 1) for s in facts.attention])


class SwapsGateAndUp(Sound):
    """model.24"""

    def weight_table(self) -> WeightTable:
        table = super().weight_table()
        swapped = {"gate": "up", "up": "gate"}
        renames = [Rename(r.pattern, r.into, swapped.get(r.shard, r.shard)) for r in table.renames]
        return replace(table, renames=renames)


class ScoresTooSharp(Sound):
    """model.24"""

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        return super().forward(token_ids_T, positions_T, lambda layer, q, k, v: attend(layer, 1.1 * q, k, v))


BROKEN = Sound.__subclasses__()


@pytest.fixture(autouse=True)
def usual_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def test_a_sound_model_passes() -> None:
    results = run({"TestSubject": suite(Sound)})
    assert {r.test: r.reason for r in results if r.outcome != "passed"} == {}


@pytest.mark.parametrize("model", BROKEN, ids=lambda model: model.__name__)
def test_a_broken_model_is_caught(model: type) -> None:
    scenario = (model.__doc__ or "").strip()
    results = run({"TestSubject": suite(model)}, only=[scenario])
    assert "failed" in {result.outcome for result in results}, results


@pytest.mark.parametrize(
    ("installed", "expected"),
    [(True, "transformers does not know"), (False, "transformers is not installed: pip install")],
)
def test_why_there_is_no_reference(monkeypatch: pytest.MonkeyPatch, installed: bool, expected: str) -> None:
    if not installed:
        monkeypatch.setattr(known_architectures, "find_spec", lambda name: None)
    alone = type("TestAlone", (suite(Sound),), {"reference": staticmethod(known_architectures.known_logits)})
    results = run({"TestAlone": alone}, only=["model.24"])
    assert {result.outcome for result in results} == {"skipped"}
    assert all(expected in result.reason for result in results)

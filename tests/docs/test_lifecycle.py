"""The order in which contracts say that their methods run is the order in which they do."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest

from dovetail import LLM, SamplingParams
from dovetail.contracts.attention import AttentionBackend
from dovetail.contracts.executor import Executor
from dovetail.contracts.model import Model
from dovetail.contracts.platform import Platform
from dovetail.contracts.quant import QuantMethod
from dovetail.contracts.specdec import SpecDecoder
from dovetail.layers.linear import Unquantized
from dovetail.platforms.cpu.platform import CpuPlatform
from dovetail.platforms.cpu.reference_attention import ReferenceAttention
from dovetail.runner.executor import LocalExecutor
from dovetail_models.llama import Llama
from dovetail_specdec.ngram import NgramDecoder

LIFECYCLE = runpy.run_path(str(Path(__file__).parents[2] / "scripts/lifecycle.py"))
IMPLEMENTATIONS = {
    Platform: CpuPlatform,
    AttentionBackend: ReferenceAttention,
    Model: Llama,
    QuantMethod: Unquantized,
    SpecDecoder: NgramDecoder,
    Executor: LocalExecutor,
}
UNSEEN = {(QuantMethod, "recognises"), (Executor, "run"), (Platform, "staging")}
"""Only a quantized checkpoint is recognised, only an executor that cannot submit is asked to run, and only tensors on
their way out of the host's memory are staged.
"""


@pytest.fixture(scope="module")
def seen() -> dict[type, list[str]]:
    """Per contract, its methods in the order of their first call, from start to end of an engine."""
    first_calls: dict[type, list[str]] = {contract: [] for contract in IMPLEMENTATIONS}
    with pytest.MonkeyPatch.context() as patch:
        for contract, cls in IMPLEMENTATIONS.items():
            for call in LIFECYCLE["calls"](contract):
                patch.setattr(cls, call.method, _recorded(cls, call.method, first_calls[contract]))
        options = {"attention": "reference", "speculative_config": {"method": "ngram"}, "max_num_seqs": 1}
        llm = LLM(max_model_len=64, **options)
        # Two requests for one slot: the first leaves before the second runs.
        llm.generate(["Once upon a time", "The king"], SamplingParams(max_tokens=4, temperature=0.0))
        llm.close()
    return first_calls


def _recorded(cls: type, name: str, first_calls: list[str]):
    original = inspect.getattr_static(cls, name)

    def note() -> None:
        if name not in first_calls:
            first_calls.append(name)

    if isinstance(original, property):
        return property(lambda self: (note(), original.fget(self))[1])
    if isinstance(original, classmethod):
        return classmethod(lambda owner, *args, **named: (note(), original.__func__(owner, *args, **named))[1])
    return lambda self, *args, **named: (note(), original(self, *args, **named))[1]


@pytest.mark.parametrize("contract", IMPLEMENTATIONS, ids=lambda contract: contract.__name__)
def test_methods_run_in_the_documented_order(seen, contract: type) -> None:
    documented = [call.method for call in LIFECYCLE["calls"](contract) if (contract, call.method) not in UNSEEN]
    assert seen[contract] == documented


def test_a_method_without_a_place_is_found() -> None:
    class Silent(Executor):
        """Overrides nothing."""

        def run(self, plan):
            """Does not say when it runs."""

    Silent.__abstractmethods__ = frozenset({"run"})
    with pytest.raises(AssertionError, match=r"Silent\.run does not say"):
        LIFECYCLE["calls"](Silent)

"""Platforms with one realistic mistake each: the suite catches every one, in the scenario that is about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from dovetail.contracts.platform import (
    Bucket,
    ExactShapes,
    LadderShapes,
    MemoryInfo,
    PlatformConfig,
    Probe,
    ShapePolicy,
    StepFunction,
)
from dovetail.errors import ConfigError
from dovetail.ops import reference
from dovetail.plugins.manifest import PlatformManifest
from dovetail.tensors import leaves, replaced
from dovetail.testing.conformance import PlatformSuite, scenarios, unregistered
from dovetail.testing.platforms import GIB, ReferencePlatform

MANIFEST = PlatformManifest(
    name="broken", summary="For tests.", device_type="cpu", dtypes=("float32",), attention=("reference",)
)


class ProbeRaises(ReferencePlatform):
    @classmethod
    def probe(cls) -> Probe:
        raise RuntimeError("no driver")


class UnavailableWithoutReason(ReferencePlatform):
    @classmethod
    def probe(cls) -> Probe:
        return Probe(available=False)


class FactsAreNumbers(ReferencePlatform):
    @classmethod
    def probe(cls) -> Probe:
        return Probe(available=True, facts={"cores": 4})  # type: ignore[dict-item]


class ProbeSetsThreads(ReferencePlatform):
    @classmethod
    def probe(cls) -> Probe:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return Probe(available=True)


class AnotherDevice(ReferencePlatform):
    @property
    def device(self) -> torch.device:
        return torch.device("meta")


class MoreAvailableThanThereIs(ReferencePlatform):
    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=GIB, available=2 * GIB)


class MemoryInMegabytes(ReferencePlatform):
    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=4096, available=4000)


class MemoryInFractions(ReferencePlatform):
    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=4 * GIB, available=0.9 * 4 * GIB)  # type: ignore[arg-type]


class NeverPeaks(ReferencePlatform):
    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=4 * GIB, available=4 * GIB, held=GIB, peak=GIB)


class PeaksForGood(ReferencePlatform):
    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=4 * GIB, available=4 * GIB, held=GIB, peak=2 * GIB)


class NeverPeaksInSteps(ReferencePlatform):
    """Whose memory is its own, so that nothing else takes any."""

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=4 * GIB, available=3 * GIB, dedicated=True, held=GIB, peak=GIB)


class PeaksBeforeThereIsAStep(ReferencePlatform):
    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=4 * GIB, available=3 * GIB, dedicated=True, held=GIB, peak=2 * GIB)


class TakesTheCheckpointsDtype(ReferencePlatform):
    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return checkpoint_dtype


class OneAtATime(ReferencePlatform):
    latest: ClassVar[Any] = None

    def __init__(self, config: PlatformConfig) -> None:
        super().__init__(config)
        OneAtATime.latest = self

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return reference.linear(x, packed, bias) if OneAtATime.latest is self else torch.zeros_like(x)

        return {"linear": linear}


class RefusesInItsOwnWay(ReferencePlatform):
    def __init__(self, config: PlatformConfig) -> None:
        super().__init__(config)
        if config.num_threads == 0:
            raise ValueError("bad number of threads")


class RefusesWithoutTheValue(ReferencePlatform):
    def __init__(self, config: PlatformConfig) -> None:
        super().__init__(config)
        if config.num_threads == 0:
            raise ConfigError("cannot do that")


class OpsUndeclared(ReferencePlatform):
    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        return {"rms_norm": reference.rms_norm}


class OpsUnknown(ReferencePlatform):
    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        return {"rmsnorm": reference.rms_norm}


class Policy(ShapePolicy):
    """A right ladder of multiples of 8, in pieces small enough to break one at a time."""

    static = True

    def __init__(self, tokens: int, requests: int) -> None:
        self.tokens, self.requests = tokens, requests

    def up(self, size: int, most: int) -> int:
        return min(most, -(-size // 8) * 8)

    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        return Bucket(self.up(num_tokens, self.tokens), self.up(num_requests, self.requests))

    def sizes(self, most: int) -> list[int]:
        return [*range(8, most, 8), most]

    def ladder(self) -> Sequence[Bucket]:
        pairs = {Bucket(t, r) for t in self.sizes(self.tokens) for r in self.sizes(self.requests)}
        return sorted(pairs, reverse=True)


class Shaped(ReferencePlatform):
    policy: ClassVar[Any] = Policy

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        made: ShapePolicy = self.policy(max_tokens, max_requests)
        return made


class FitRoundsDown(Policy):
    def up(self, size: int, most: int) -> int:
        return max(1, size // 8 * 8)


class LadderWithoutItsTop(Policy):
    def up(self, size: int, most: int) -> int:
        rungs = [2**n for n in range(12) if 2**n <= most]
        return next(rung for rung in rungs if rung >= size)


class FitForgetsRequests(Policy):
    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        return Bucket(self.up(num_tokens, self.tokens), min(self.requests, max(1, num_tokens // 8)))


class FitOverstepsItself(Policy):
    def up(self, size: int, most: int) -> int:
        return size + 1


class SmallStepsGetTheLargest(Policy):
    def up(self, size: int, most: int) -> int:
        return most if size < 4 else super().up(size, most)


class EmptyLadder(Policy):
    def ladder(self) -> Sequence[Bucket]:
        return []


class SmallestFirst(Policy):
    def ladder(self) -> Sequence[Bucket]:
        return sorted(super().ladder())


class Twice(Policy):
    def ladder(self) -> Sequence[Bucket]:
        return [bucket for bucket in super().ladder() for _ in range(2)]


class LargestIsNotWarmedUp(Policy):
    def ladder(self) -> Sequence[Bucket]:
        return super().ladder()[1:] or super().ladder()


class RungsThatNothingFits(Policy):
    def ladder(self) -> Sequence[Bucket]:
        return sorted({*super().ladder(), Bucket(self.tokens + 3, self.requests)}, reverse=True)


class StaticInName(Policy):
    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        return Bucket(num_tokens, num_requests)


class ReplaysTheFirstInputs(ReferencePlatform):
    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        captured: list[Any] = []

        def replay(tensors: Any, metadata: Any) -> Any:
            captured.append(captured[0] if captured else tensors)
            return step(captured[0], metadata)

        return replay


class CopiesTokensAlone(ReferencePlatform):
    """A graph with buffers for its inputs, one of which is forgotten."""

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        buffers: list[Any] = []

        def replay(tensors: Any, metadata: Any) -> Any:
            if not buffers:
                buffers.append(tensors)
            buffers[0] = replace(buffers[0], token_ids_T=tensors.token_ids_T, positions_T=tensors.positions_T)
            return step(buffers[0], metadata)

        return replay


class CompilesTheLastForAll(ReferencePlatform):
    """One program for all buckets."""

    program: ClassVar[Any] = None

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        def run(tensors: Any, metadata: Any) -> Any:
            hidden, logits = step(tensors, metadata)
            return hidden[: self.smallest], logits[: self.smallest]

        self.smallest = min(getattr(self, "smallest", bucket.num_tokens), bucket.num_tokens)
        return run


class ReplaysTheFirstMetadata(ReferencePlatform):
    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        captured: list[Any] = []

        def replay(tensors: Any, metadata: Any) -> Any:
            captured.append(metadata)
            return step(tensors, captured[0])

        return replay


class SamplesByRow(ReferencePlatform):
    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        def sample(logits: torch.Tensor, params: Any) -> torch.Tensor:
            if params.all_greedy:
                return reference.sample(logits, params)
            rows = torch.arange(len(logits))
            return reference.sample(logits, replace(params, seeds_S=params.seeds_S * 0 + rows + len(rows)))

        return {"sample": sample}


class OneBufferForAll(ReferencePlatform):
    """Downloads that are under way at the same time overwrite each other."""

    buffers: ClassVar[dict[int, torch.Tensor]] = {}

    def download(self, tensors: Sequence[torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]]:
        for i, tensor in enumerate(tensors):
            self.buffers[i] = tensor.clone()
        return lambda: [self.buffers[i] for i in range(len(tensors))]


class UploadsAsFloat(ReferencePlatform):
    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return super().upload(host).to(torch.float32)


class OnePlaceForAll(ReferencePlatform):
    """Gives every reader the same memory."""

    place: ClassVar[torch.Tensor] = torch.empty(1 << 20, dtype=torch.uint8)

    def staging(self, nbytes: int) -> torch.Tensor:
        return self.place[:nbytes]


class WholePages(ReferencePlatform):
    def staging(self, nbytes: int) -> torch.Tensor:
        return super().staging(-(-nbytes // 4096) * 4096)


class AdoptsHalfPrecision(ReferencePlatform):
    def adopt(self, value: Any) -> Any:
        kept: dict[int, torch.Tensor] = {}

        def halved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.half().float() if tensor.is_floating_point() else kept.setdefault(id(tensor), tensor.clone())

        return replaced(value, halved)


class AdoptsEachPlaceAlone(ReferencePlatform):
    """Copies a table that is found twice twice."""

    def adopt(self, value: Any) -> Any:
        return replaced(value, torch.clone)


class ForgetsWhatStepsChange(ReferencePlatform):
    """Compiles pure functions: each step starts from the tables that were adopted."""

    def adopt(self, value: Any) -> Any:
        self.adopted = [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
        return value

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        def pure(tensors: Any, metadata: Any) -> Any:
            before = [tensor.clone() for tensor in self.adopted]
            outputs = step(tensors, metadata)
            for tensor, content in zip(self.adopted, before, strict=True):
                tensor.copy_(content)
            return outputs

        return pure


class WarmsUpTooLittle(Shaped):
    """Claims static shapes and compiles while serving."""

    class policy(ExactShapes):  # noqa: N801  it takes the attribute's place
        static = True

        def __init__(self, tokens: int, requests: int) -> None:
            super().__init__([Bucket(tokens, requests), Bucket(1, 1)])


class PadsRequestsNever(Shaped):
    """Buckets of tokens alone, whose steps differ in their requests."""

    class policy(LadderShapes):  # noqa: N801
        def __init__(self, tokens: int, requests: int) -> None:
            super().__init__(sorted({1, 8, tokens}), range(1, requests + 1))

        def ladder(self) -> Sequence[Bucket]:
            return [bucket for bucket in super().ladder() if bucket.num_requests in (1, 4)]


MUTANTS = {
    ProbeRaises: "platform.1",
    UnavailableWithoutReason: "platform.1",
    FactsAreNumbers: "platform.1",
    ProbeSetsThreads: "platform.2",
    AnotherDevice: "platform.3",
    MoreAvailableThanThereIs: "platform.4",
    NeverPeaks: "platform.4",
    PeaksForGood: "platform.4",
    NeverPeaksInSteps: "platform.4",
    PeaksBeforeThereIsAStep: "platform.4",
    MemoryInMegabytes: "platform.4",
    MemoryInFractions: "platform.4",
    TakesTheCheckpointsDtype: "platform.5",
    OneAtATime: "platform.7",
    RefusesInItsOwnWay: "platform.8",
    RefusesWithoutTheValue: "platform.8",
    OpsUndeclared: "platform.9",
    OpsUnknown: "platform.9",
    FitRoundsDown: "platform.10",
    LadderWithoutItsTop: "platform.10",
    FitForgetsRequests: "platform.10",
    FitOverstepsItself: "platform.10",
    SmallStepsGetTheLargest: "platform.11",
    EmptyLadder: "platform.12",
    SmallestFirst: "platform.12",
    Twice: "platform.12",
    LargestIsNotWarmedUp: "platform.12",
    RungsThatNothingFits: "platform.12",
    StaticInName: "platform.12",
    ReplaysTheFirstInputs: "platform.13",
    CopiesTokensAlone: "platform.13",
    CompilesTheLastForAll: "platform.13",
    ReplaysTheFirstMetadata: "platform.14",
    SamplesByRow: "platform.15",
    WarmsUpTooLittle: "platform.16",
    PadsRequestsNever: "platform.16",
    OneBufferForAll: "platform.17",
    UploadsAsFloat: "platform.17",
    OnePlaceForAll: "platform.18",
    WholePages: "platform.18",
    AdoptsHalfPrecision: "platform.19",
    AdoptsEachPlaceAlone: "platform.19",
    ForgetsWhatStepsChange: "platform.19",
}
CLAIMS = {
    "no such dtype": (replace(MANIFEST, dtypes=("float32", "float31")), "platform.6"),
    "no such attention backend": (replace(MANIFEST, attention=("reference", "refrence")), "platform.6"),
    "no attention backend": (replace(MANIFEST, attention=()), "platform.6"),
    "an operation that is not given": (replace(MANIFEST, ops=frozenset({"linear"})), "platform.9"),
}
RAISE = {ProbeRaises, LadderWithoutItsTop}
"""Mutants whose own exception is what the report shows."""


class TestTheUnbrokenPolicy(PlatformSuite):
    subject = unregistered(Shaped, MANIFEST)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_caught(mutant, failing):
    scenario = MUTANTS[mutant]
    cls = type("Broken", (Shaped,), {"policy": mutant}) if issubclass(mutant, ShapePolicy) else mutant
    reason = failing(PlatformSuite, unregistered(cls, MANIFEST), scenario).get(scenario, "")
    assert reason if mutant in RAISE else reason.startswith(f"{scenario}: "), reason or f"{scenario} does not notice"


@pytest.mark.parametrize("claim", CLAIMS)
def test_wrong_claims_are_caught(claim, failing):
    manifest, scenario = CLAIMS[claim]
    reason = failing(PlatformSuite, unregistered(ReferencePlatform, manifest), scenario).get(scenario, "")
    assert reason.startswith(f"{scenario}: "), reason or f"{scenario} does not notice"


def test_every_scenario_catches_something():
    caught = {*MUTANTS.values(), *(scenario for _, scenario in CLAIMS.values())}
    assert caught == {scenario.id for scenario in scenarios(PlatformSuite)}

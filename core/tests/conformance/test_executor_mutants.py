"""Executors with one realistic mistake each: the suite catches every one, in the scenario that is about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from dovetail.contracts.executor import ExecutorInfo, Progress
from dovetail.messages import NULL_BLOCK, NewRow, StepPlan, StepResult, TokenLogprobs
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.conformance import ExecutorManifest, ExecutorSuite, scenarios, unregistered

MANIFEST = ExecutorManifest(
    name="broken",
    summary="For tests.",
    checkpoint=True,
    logit_rules=True,
    filters=True,
    logprobs=True,
    prompt_logprobs=True,
    drafts=True,
)


class Distorting(LocalExecutor):
    """The right executor behind a distortion of its plans and results."""

    def run(self, plan: StepPlan) -> StepResult:
        return self.result(super().run(self.plan(plan)), plan)

    def plan(self, plan: StepPlan) -> StepPlan:
        return replace(plan, new_rows=[self.row(row) for row in plan.new_rows])

    def row(self, row: NewRow) -> NewRow:
        return row

    def params(self, row: NewRow, **changes: Any) -> NewRow:
        return replace(row, params=replace(row.params, **changes))

    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        return result


class KnowsTokensWhenRead(LocalExecutor):
    """What a step samples reaches the tables when its result is read, and the next step may be under way by then."""

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        tokens = self._runner._tables.tokens_SL
        unread = [(slot, plan.num_computed[i] + plan.num_scheduled[i]) for i, slot in enumerate(plan.slots)]
        before = [tokens[place].clone() for place in unread]
        read = super().submit(plan)
        after = [tokens[place].clone() for place in unread]
        self._put(unread, before)

        def result() -> StepResult:
            self._put(unread, after)
            return read()

        return result

    @torch.inference_mode()
    def _put(self, places: Sequence[tuple[int, int]], values: Sequence[torch.Tensor]) -> None:
        for place, value in zip(places, values, strict=True):
            self._runner._tables.tokens_SL[place] = value


class LosesALayer(Distorting):
    def load(self, progress: Progress) -> ExecutorInfo:
        info = super().load(progress)
        return replace(info, groups=(*info.groups[:-1], replace(info.groups[-1], layers=())))


class CountsBlocksOfOneGroup(Distorting):
    def load(self, progress: Progress) -> ExecutorInfo:
        return replace(super().load(progress), num_blocks=9)


class LoadsInSilence(Distorting):
    def load(self, progress: Progress) -> ExecutorInfo:
        return super().load(Progress())


class ClosesOnce(Distorting):
    def close(self) -> None:
        assert self._runner is not None
        super().close()


class FailsItsOwnWay(Distorting):
    def load(self, progress: Progress) -> ExecutorInfo:
        try:
            return super().load(progress)
        except Exception as error:
            raise RuntimeError("load failed") from error


class FailsWithoutTheFile(Distorting):
    def load(self, progress: Progress) -> ExecutorInfo:
        from dovetail.errors import ModelLoadError

        try:
            return super().load(progress)
        except Exception as error:
            raise ModelLoadError("The checkpoint cannot be read.") from error


class IgnoresNewBlocks(Distorting):
    def plan(self, plan: StepPlan) -> StepPlan:
        return replace(plan, block_updates=[])


class PutsBlocksOnePageOff(Distorting):
    def plan(self, plan: StepPlan) -> StepPlan:
        return replace(plan, block_updates=[(s, g, max(0, first - 1), ids) for s, g, first, ids in plan.block_updates])


class ChangesItsPlan(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        plan.freed_slots.append(3)
        return result


class SaysAnotherStep(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        return replace(result, step=0)


class SamplesInEveryChunk(Distorting):
    def plan(self, plan: StepPlan) -> StepPlan:
        return replace(plan, samples=[True] * len(plan.samples))


class AnswersBySlot(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        order = sorted(range(len(plan.slots)), key=plan.slots.__getitem__)
        return replace(result, token_ids=[result.token_ids[i] for i in order])


class ForgetsWhoSitsOut(Distorting):
    """Takes every slot that is not in the plan for free."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[int] = []

    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        back = [i for i, slot in enumerate(plan.slots) if slot not in self.seen and plan.num_computed[i]]
        self.seen = plan.slots
        return replace(result, token_ids=[[0] if i in back and ids else ids for i, ids in enumerate(result.token_ids)])


class KeepsTheFormersParameters(Distorting):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.known: dict[int, Any] = {}

    def row(self, row: NewRow) -> NewRow:
        return replace(row, params=self.known.setdefault(row.slot, row.params))


class SkipsTheLastSlot(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        columns = zip(plan.slots, result.token_ids, strict=True)
        return replace(result, token_ids=[[0] if ids and slot == 3 else ids for slot, ids in columns])


class ForgetsThePrefix(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return replace(row, block_ids=[[ids[-1]] * len(ids) for ids in row.block_ids])


class StartsOverAfterPreemption(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return replace(row, seed=row.seed + len(row.token_ids) - row.prompt_len)


class FreesOnePageTooMany(Distorting):
    def plan(self, plan: StepPlan) -> StepPlan:
        updates = [
            (slot, group, first, [*ids, NULL_BLOCK] if ids and set(ids) == {NULL_BLOCK} else ids)
            for slot, group, first, ids in plan.block_updates
        ]
        return replace(plan, block_updates=updates)


class SeedsBySlot(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return replace(row, seed=row.slot)


class SeedsOfThirtyTwoBits(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return replace(row, seed=row.seed & 0xFFFFFFFF)


class WithoutFilters(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(row, top_k=0, top_p=1.0, min_p=0.0)


class WithoutMinP(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(row, min_p=0.0)


class WithoutBias(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(row, logit_bias=None)


class PresenceForFrequency(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(
            row, presence_penalty=row.params.frequency_penalty, frequency_penalty=row.params.presence_penalty
        )


class WithoutMinTokens(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(row, min_tokens=0)


class MinTokensForEver(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(row, min_tokens=row.params.min_tokens and 1000)


class LogprobsForAll(Distorting):
    def row(self, row: NewRow) -> NewRow:
        return self.params(row, logprobs=row.params.logprobs or 0)


class RanksFromZero(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        return replace(result, logprobs=[scores and [_lower(score) for score in scores] for scores in result.logprobs])


class LogitsForLogprobs(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        scores = [own and [replace(score, logprob=score.logprob + 3) for score in own] for own in result.logprobs]
        return replace(result, logprobs=scores)


class PromptLogprobsFromTheFirst(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        return replace(result, prompt_logprobs=[scores and scores[1:] for scores in result.prompt_logprobs])


class PromptLogprobsAgain(Distorting):
    """Reports the last chunk's once more after the prompt."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last: dict[int, Any] = {}

    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        scores = [own or self.last.get(s) for s, own in zip(plan.slots, result.prompt_logprobs, strict=True)]
        self.last = dict(zip(plan.slots, scores, strict=True))
        return replace(result, prompt_logprobs=scores)


class AcceptsEveryDraft(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        columns = zip(plan.drafts, result.token_ids, strict=True)
        return replace(result, token_ids=[[*drafts, ids[-1]] if drafts and ids else ids for drafts, ids in columns])


class AcceptsNoDraft(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        return replace(result, token_ids=[ids[:1] for ids in result.token_ids])


class ProposesTooMany(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        return replace(result, drafts=[[*drafts, 1, 2, 3] if drafts else [] for drafts in result.drafts])


class VerifiesItsOwnProposals(Distorting):
    """Takes what it proposed for what the plan wants verified."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.proposed: dict[int, Sequence[int]] = {}

    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        tokens = [
            [*ids, 0] if ids and len(self.proposed.get(slot, ())) > len(drafts) else ids
            for slot, ids, drafts in zip(plan.slots, result.token_ids, plan.drafts, strict=True)
        ]
        self.proposed = dict(zip(plan.slots, result.drafts, strict=True))
        return replace(result, token_ids=tokens)


class HidesErrors(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        tokens = [[0] if i in result.errors else ids for i, ids in enumerate(result.token_ids)]
        return replace(result, errors={}, token_ids=tokens)


class OneErrorForAll(Distorting):
    def result(self, result: StepResult, plan: StepPlan) -> StepResult:
        if not result.errors:
            return result
        return replace(result, errors=dict.fromkeys(range(len(plan.slots)), "NaN"), token_ids=[[] for _ in plan.slots])


def _lower(score: TokenLogprobs) -> TokenLogprobs:
    return replace(score, rank=score.rank - 1)


MUTANTS = {
    LosesALayer: "executor.1",
    CountsBlocksOfOneGroup: "executor.1",
    LoadsInSilence: "executor.1",
    ClosesOnce: "executor.2",
    FailsItsOwnWay: "executor.3",
    FailsWithoutTheFile: "executor.3",
    IgnoresNewBlocks: "executor.4",
    PutsBlocksOnePageOff: "executor.4",
    ChangesItsPlan: "executor.4",
    SaysAnotherStep: "executor.4",
    SamplesInEveryChunk: "executor.5",
    AnswersBySlot: "executor.6",
    ForgetsWhoSitsOut: "executor.7",
    KeepsTheFormersParameters: "executor.8",
    SkipsTheLastSlot: "executor.9",
    ForgetsThePrefix: "executor.10",
    StartsOverAfterPreemption: "executor.11",
    FreesOnePageTooMany: "executor.12",
    SeedsBySlot: "executor.13",
    SeedsOfThirtyTwoBits: "executor.13",
    WithoutFilters: "executor.14",
    WithoutMinP: "executor.14",
    WithoutBias: "executor.15",
    PresenceForFrequency: "executor.15",
    WithoutMinTokens: "executor.16",
    MinTokensForEver: "executor.16",
    LogprobsForAll: "executor.17",
    RanksFromZero: "executor.17",
    LogitsForLogprobs: "executor.17",
    PromptLogprobsFromTheFirst: "executor.18",
    PromptLogprobsAgain: "executor.18",
    AcceptsEveryDraft: "executor.19",
    AcceptsNoDraft: "executor.19",
    ProposesTooMany: "executor.19",
    VerifiesItsOwnProposals: "executor.20",
    HidesErrors: "executor.21",
    OneErrorForAll: "executor.21",
    KnowsTokensWhenRead: "executor.22",
}
RAISE = {ClosesOnce}
"""Mutants whose own exception is what the report shows."""
SILENT = changed(MANIFEST, logprobs=False, prompt_logprobs=False, drafts=False, filters=False, logit_rules=False)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_caught(mutant, failing):
    scenario = MUTANTS[mutant]
    reason = failing(ExecutorSuite, unregistered(mutant, MANIFEST), scenario).get(scenario, "")
    assert reason if mutant in RAISE else reason.startswith(f"{scenario}: "), reason or f"{scenario} does not notice"


def test_capabilities_are_closed_by_default(failing):
    """What is not declared is not asked for."""
    assert failing(ExecutorSuite, unregistered(AcceptsNoDraft, SILENT), "executor.19") == {}


def test_every_scenario_catches_something():
    assert set(MUTANTS.values()) == {scenario.id for scenario in scenarios(ExecutorSuite)}

"""Writes step plans by hand, in place of a scheduler, and checks the form of every result."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from dovetail.contracts.executor import Executor, ExecutorInfo
from dovetail.messages import MESSAGES_VERSION, NULL_BLOCK, NewRow, StepPlan, StepResult
from dovetail.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


class ResultError(AssertionError):
    """A result breaks a promise of :class:`dovetail.messages.StepResult`."""


@dataclass(kw_only=True)
class Written:
    """A request as the plans tell of it.

    Attributes:
        tokens: known and verified: prompt, then output.
        blocks: per KV group, the blocks that hold it.
        computed: tokens whose KV is stored.
        entered: whether a plan has brought it into its slot.
        proposals: what the executor proposed after its last step.
    """

    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    blocks: list[list[int]]
    computed: int = 0
    entered: bool = False
    proposals: list[int] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        """What was generated."""
        return self.tokens[self.prompt_len :]

    @property
    def left(self) -> int:
        """Known tokens that are not computed."""
        return len(self.tokens) - self.computed


class PlanWriter:
    """Requests in slots, and the plans that compute them.

    Attributes:
        rows: the requests, by slot.
        executor: that runs the plans.
    """

    def __init__(self, executor: Executor, info: ExecutorInfo) -> None:
        self.rows: dict[int, Written] = {}
        self.executor = executor
        self._info = info
        self._step = 0
        self._freed: list[int] = []
        self._nulls: list[tuple[int, int, int, list[int]]] = []
        self._held: Counter[int] = Counter()
        self._free = list(range(1, info.num_blocks))
        random.Random(3).shuffle(self._free)

    def enter(
        self,
        slot: int,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        seed: int = 0,
        output: Sequence[int] = (),
        eos_token_ids: tuple[int, ...] = (),
        shares: tuple[int, int] | None = None,
    ) -> Written:
        """Put a request into a free slot; the next step that computes it tells the executor.

        Args:
            output: what it generated before it was preempted.
            shares: ``(slot, blocks)``: the first blocks are those of another request, and are computed already, or will
                be in the same step.
        """
        blocks: list[list[int]] = [[] for _ in self._info.groups]
        if shares is not None:
            self._grow(shares[0], shares[1] * self._info.block_size)
            blocks = [list(held[: shares[1]]) for held in self.rows[shares[0]].blocks]
            self._held.update(block for held in blocks for block in held)
        self.rows[slot] = Written(
            tokens=[*prompt, *output],
            prompt_len=len(prompt),
            params=params,
            seed=seed,
            eos_token_ids=eos_token_ids,
            blocks=blocks,
            computed=0 if shares is None else shares[1] * self._info.block_size,
        )
        return self.rows[slot]

    def leave(self, slot: int) -> Written:
        """Free a slot, and the blocks that nobody else holds."""
        row = self.rows.pop(slot)
        for block in (block for held in row.blocks for block in held if block != NULL_BLOCK):
            self._held[block] -= 1
            if not self._held[block]:
                self._free.append(block)
        if row.entered:
            self._freed.append(slot)
        return row

    def slide(self, slot: int, group: int, pages: int) -> None:
        """The first pages of a group slid out of its window: their blocks are taken away."""
        held = self.rows[slot].blocks[group]
        for block in held[:pages]:
            if block != NULL_BLOCK:
                self._held[block] -= 1
                self._free.insert(0, block)
        held[:pages] = [NULL_BLOCK] * pages
        self._nulls.append((slot, group, 0, [NULL_BLOCK] * pages))

    def step(self, counts: Mapping[int, int], drafts: Mapping[int, Sequence[int]] | None = None) -> StepResult:
        """Compute tokens of these slots, in this order.

        Args:
            counts: known tokens to compute, by slot.
            drafts: to verify beyond them, for slots that reach their last known token.

        Raises:
            ResultError: the form of the result is wrong.
        """
        plan = self._plan(counts, drafts or {})
        before = msgspec.msgpack.encode(plan)
        result = self.executor.run(plan)
        if msgspec.msgpack.encode(plan) != before:
            raise ResultError("the executor changed its plan; plans are immutable.")
        check_result(plan, result)
        self._take(plan, result)
        return result

    def finish(self, slots: Sequence[int] | None = None, count: int = 8) -> dict[int, list[int]]:
        """Decode the slots side by side until each has ``count`` tokens of output; returns the outputs."""
        chosen = list(self.rows) if slots is None else list(slots)
        while any(len(self.rows[slot].output) < count for slot in chosen):
            self.step({slot: self.rows[slot].left for slot in chosen if len(self.rows[slot].output) < count})
        return {slot: self.rows[slot].output[:count] for slot in chosen}

    def decode_ahead(self, slots: Sequence[int], count: int, depth: int) -> None:
        """Decode the slots side by side for ``count`` steps, up to ``depth`` of which are submitted before one is read.

        Each slot has one known token left.
        """
        submitted: deque[tuple[StepPlan, Callable[[], StepResult]]] = deque()
        while count or submitted:
            if count and len(submitted) < depth:
                plan = self._plan(dict.fromkeys(slots, 1), {}, ahead=len(submitted))
                submitted.append((plan, self.executor.submit(plan)))
                count -= 1
            else:
                plan, read = submitted.popleft()
                result = read()
                check_result(plan, result)
                self._take(plan, result)

    def _plan(self, counts: Mapping[int, int], drafts: Mapping[int, Sequence[int]], ahead: int = 0) -> StepPlan:
        """The next plan, after ``ahead`` that decode the same slots and were not read yet."""
        updates = list(self._nulls)
        for slot, count in counts.items():
            updates += self._grow(slot, self.rows[slot].computed + ahead + count + len(drafts.get(slot, ())))
        rows = [self.rows[slot] for slot in counts]
        freed, self._freed, self._nulls = self._freed, [], []
        return StepPlan(
            step=self._step + ahead,
            new_rows=[self._new_row(slot) for slot in counts if not self.rows[slot].entered],
            freed_slots=freed,
            slots=list(counts),
            num_computed=[row.computed + ahead for row in rows],
            num_scheduled=[count + len(drafts.get(slot, ())) for slot, count in counts.items()],
            drafts=[list(drafts.get(slot, ())) for slot in counts],
            samples=[row.computed + count == len(row.tokens) for row, count in zip(rows, counts.values(), strict=True)],
            block_updates=updates,
            extras={"someone-elses": {"payload": 1}},
        )

    def _new_row(self, slot: int) -> NewRow:
        row = self.rows[slot]
        return NewRow(
            slot=slot,
            request_id=f"request in {slot}",
            token_ids=list(row.tokens),
            prompt_len=row.prompt_len,
            params=row.params,
            eos_token_ids=row.eos_token_ids,
            seed=row.seed,
            block_ids=[list(held) for held in row.blocks],
            extras={"someone-elses": 2},
        )

    def _grow(self, slot: int, tokens: int) -> list[tuple[int, int, int, list[int]]]:
        """Give blocks to a request; for one that is in its slot already, returns the updates."""
        row, updates = self.rows[slot], []
        for group, held in enumerate(row.blocks):
            first = len(held)
            while len(held) * self._info.block_size < tokens:
                held.append(self._free.pop(0))
                self._held[held[-1]] += 1
            if row.entered and len(held) > first:
                updates.append((slot, group, first, held[first:]))
        return updates

    def _take(self, plan: StepPlan, result: StepResult) -> None:
        self._step += 1
        for i, slot in enumerate(plan.slots):
            row, new = self.rows[slot], result.token_ids[i]
            row.entered = True
            row.tokens += new
            row.computed = plan.num_computed[i] + plan.num_scheduled[i]
            if new:
                row.computed -= len(plan.drafts[i]) + 1 - len(new)
            row.proposals = list(result.drafts[i])


def check_result(plan: StepPlan, result: StepResult) -> None:
    """Whether columns, lengths and versions of a result are those that its plan asks for.

    Raises:
        ResultError: they are not.
    """
    if result.step != plan.step or result.version != MESSAGES_VERSION:
        found = f"step {result.step}, version {result.version}"
        raise ResultError(f"the result of step {plan.step}, version {MESSAGES_VERSION}, says that it is of {found}.")
    for name in ("token_ids", "drafts", "logprobs", "prompt_logprobs"):
        column = getattr(result, name)
        if len(column) != len(plan.slots):
            raise ResultError(f"{name} has {len(column)} columns for {len(plan.slots)} slots.")
    for i, (tokens, drafts, samples) in enumerate(zip(result.token_ids, plan.drafts, plan.samples, strict=True)):
        most = 1 + len(drafts) if samples and i not in result.errors else 0
        if len(tokens) > most or (most and not tokens):
            raise ResultError(f"column {i}, samples {samples}, {len(drafts)} drafts: got the tokens {tokens}.")
        scores = result.logprobs[i]
        if scores is not None and len(scores) != len(tokens):
            raise ResultError(f"column {i} has {len(scores)} logprobs for {len(tokens)} tokens.")
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult)
    if decoded != result:
        raise ResultError("the result changes on its way through msgpack; use plain numbers, lists and text.")

"""ScriptedExecutor: an executor without a device that answers by a script and checks every plan."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dovetail.config import EngineConfig
from dovetail.contracts.executor import Executor, ExecutorInfo, KVGroup, Progress
from dovetail.messages import NULL_BLOCK, NewRow, StepPlan, StepResult, TokenLogprobs
from dovetail.testing.scripted_model import ScriptedModel

ONE_GROUP = (KVGroup(layers=(0,)),)


class PlanError(AssertionError):
    """A plan breaks a promise of :class:`dovetail.messages.StepPlan`."""


class ScriptedFailureError(RuntimeError):
    """The failure that ``fail_at`` asked for."""


class ScriptedRow:
    """One occupied slot.

    Attributes:
        tokens: known and verified.
        digests: per computed position, a digest of all tokens up to it: the "key and value" of that token.
        tables: per KV group, block ids.
        computed: tokens whose digests are stored in blocks.
        proposals: drafts that were proposed and not yet verified.
    """

    def __init__(self, row: NewRow) -> None:
        self.tokens = list(row.token_ids)
        self.prompt_len = row.prompt_len
        self.params = row.params
        self.eos_token_ids = row.eos_token_ids
        self.seed = row.seed
        self.tables = [list(ids) for ids in row.block_ids]
        self.digests: list[int] = []
        self.computed = -1
        self.proposals: list[int] = []

    def digest(self, token_ids: Sequence[int], start: int) -> None:
        """Compute the digests of ``token_ids`` from position ``start`` on."""
        del self.digests[start:]
        parent = self.digests[-1] if self.digests else 0
        for token in token_ids[len(self.digests) :]:
            parent = hash((parent, token))
            self.digests.append(parent)


class ScriptedExecutor(Executor):
    """Stands in for everything below the scheduler.

    It keeps a paged cache in which a token's entry is a digest of its whole prefix, and reads back, through
    the block tables, everything that a step's queries can see. A block that was lost, shared by mistake, or
    hit with the wrong prefix is found at the step that would have computed garbage.

    Args:
        config: limits.
        num_blocks: of the pool, the null block included; default: enough for ``max_num_seqs`` full contexts.
        groups: KV groups.
        model: the script.
        num_drafts: proposed per request and step.
        draft_accuracy: share of drafts that are right, 0 to 1.
        delay: seconds each step takes.
        fail_at: the step that raises :class:`ScriptedFailureError`.

    Raises:
        PlanError: from :meth:`run`, if a plan is wrong.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int | None = None,
        groups: tuple[KVGroup, ...] = ONE_GROUP,
        model: ScriptedModel | None = None,
        num_drafts: int = 0,
        draft_accuracy: float = 1.0,
        delay: float = 0.0,
        fail_at: int | None = None,
    ) -> None:
        pages = -(-config.max_model_len // config.block_size)
        self.config = config
        self.num_blocks = num_blocks or config.max_num_seqs * pages * len(groups) + 1
        self.groups = groups
        self.model = model or ScriptedModel(config.vocab_size)
        self.plans: list[StepPlan] = []
        self.closed = False
        self._num_drafts = num_drafts
        self._draft_accuracy = draft_accuracy
        self._delay = delay
        self._fail_at = fail_at
        self._rows: dict[int, ScriptedRow] = {}
        self._cache: list[list[tuple[int, int] | None]] = [
            [None] * config.block_size for _ in range(self.num_blocks)
        ]

    def load(self, progress: Progress) -> ExecutorInfo:
        """Nothing to load."""
        progress.update("load", 1, 1)
        return ExecutorInfo(num_blocks=self.num_blocks, block_size=self.config.block_size, groups=self.groups)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True

    def run(self, plan: StepPlan) -> StepResult:
        """Check the plan, "compute" it, and answer by the script."""
        if plan.step == self._fail_at:
            raise ScriptedFailureError(f"step {plan.step} was told to fail")
        if self._delay:
            time.sleep(self._delay)
        self._check_columns(plan)
        self._apply(plan)
        rows = [self._rows[slot] for slot in plan.slots]
        for row, start, count, drafts in zip(
            rows, plan.num_computed, plan.num_scheduled, plan.drafts, strict=True
        ):
            self._check_row(row, start, count, drafts)
            self._store(row, start, count, drafts)
        for row, start, count in zip(rows, plan.num_computed, plan.num_scheduled, strict=True):
            self._read_back(row, start, start + count)
        prompt_logprobs = [
            self._prompt_logprobs(row, start, count)
            for row, start, count in zip(rows, plan.num_computed, plan.num_scheduled, strict=True)
        ]
        token_ids = [
            self._sample(row, start, count, drafts)
            for row, start, count, drafts in zip(
                rows, plan.num_computed, plan.num_scheduled, plan.drafts, strict=True
            )
        ]
        self.plans.append(plan)
        return StepResult(
            step=plan.step,
            token_ids=token_ids,
            drafts=[self._propose(row) if new else [] for row, new in zip(rows, token_ids, strict=True)],
            logprobs=[_logprobs(row, new) for row, new in zip(rows, token_ids, strict=True)],
            prompt_logprobs=prompt_logprobs,
        )

    def _check_columns(self, plan: StepPlan) -> None:
        columns = (plan.num_computed, plan.num_scheduled, plan.drafts, plan.samples)
        _require(all(len(column) == len(plan.slots) for column in columns), "columns differ in length")
        _require(plan.step == len(self.plans), f"step {plan.step} follows {len(self.plans) - 1}")
        _require(bool(plan.slots), "the plan computes nothing")
        _require(len(set(plan.slots)) == len(plan.slots), "a slot computes twice")
        _require(plan.total_tokens <= self.config.max_num_batched_tokens, "the token budget is exceeded")

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.freed_slots:
            _require(self._rows.pop(slot, None) is not None, f"slot {slot} was freed while free")
        for row in plan.new_rows:
            _require(0 <= row.slot < self.config.max_num_seqs, f"slot {row.slot} does not exist")
            _require(row.slot not in self._rows, f"slot {row.slot} was given out twice")
            _require(row.slot in plan.slots, f"slot {row.slot} entered and computes nothing")
            self._rows[row.slot] = ScriptedRow(row)
        for slot, group, first, block_ids in plan.block_updates:
            _require(slot in self._rows, f"blocks for the free slot {slot}")
            table = self._rows[slot].tables[group]
            _require(first <= len(table), f"blocks of slot {slot} leave a gap at page {len(table)}")
            table[first : first + len(block_ids)] = block_ids
        for slot, sampled, start, count in zip(
            plan.slots, plan.samples, plan.num_computed, plan.num_scheduled, strict=True
        ):
            _require(slot in self._rows, f"the free slot {slot} computes")
            known = len(self._rows[slot].tokens)
            _require(sampled == (start + count >= known), f"slot {slot}: `samples` is {sampled}")

    def _check_row(self, row: ScriptedRow, start: int, count: int, drafts: Sequence[int]) -> None:
        known, end = len(row.tokens), start + count
        _require(count >= 1, "a request computes no token")
        if row.computed < 0:
            _require(start % self.config.block_size == 0, f"a hit of {start} tokens is no whole block")
        else:
            _require(start == row.computed, f"a request continues at {start}, not at {row.computed}")
        _require(start < known, "a hit covers the last known token")
        _require(len(drafts) == max(0, end - known), f"{len(drafts)} drafts for {end} of {known} tokens")
        _require(list(drafts) == row.proposals[: len(drafts)], "drafts were not proposed")
        _require(known + len(drafts) <= self.config.max_model_len, "drafts beyond the context")

    def _store(self, row: ScriptedRow, start: int, count: int, drafts: Sequence[int]) -> None:
        row.digest([*row.tokens, *drafts][: start + count], max(0, row.computed))
        size = self.config.block_size
        for group, table in enumerate(row.tables):
            for position in range(start, start + count):
                block = self._block(table, position // size)
                self._cache[block][position % size] = (group, row.digests[position])

    def _read_back(self, row: ScriptedRow, start: int, end: int) -> None:
        """Everything that queries ``start … end - 1`` see must be this request's own prefix."""
        size = self.config.block_size
        for group, table in enumerate(row.tables):
            window = self.groups[group].window
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, end):
                entry = self._cache[self._block(table, position // size)][position % size]
                _require(
                    entry == (group, row.digests[position]),
                    f"group {group}, page {position // size}: another prefix's KV at position {position}",
                )

    def _block(self, table: Sequence[int], page: int) -> int:
        _require(page < len(table), f"page {page} has no block")
        _require(table[page] != NULL_BLOCK, f"page {page} is needed, but its block was freed")
        _require(0 < table[page] < self.num_blocks, f"block {table[page]} does not exist")
        return table[page]

    def _sample(self, row: ScriptedRow, start: int, count: int, drafts: Sequence[int]) -> list[int]:
        """Nothing in the middle of known tokens; else the right drafts and one more token."""
        row.computed = start + count
        if start + count < len(row.tokens):
            return []
        new: list[int] = []
        for draft in (*drafts, None):
            token = self._next(row, [*row.tokens, *new])
            new.append(token)
            if token != draft:
                break
        row.tokens.extend(new)
        row.computed -= len(drafts) + 1 - len(new)
        return new

    def _propose(self, row: ScriptedRow) -> list[int]:
        """Right or wrong drafts: which of both depends on the tokens alone, so that a run can be repeated."""
        tokens = list(row.tokens)
        for _ in range(self._num_drafts):
            token = self._next(row, tokens)
            if hash((*tokens, 1)) % 1000 >= self._draft_accuracy * 1000:
                token = (token + 1) % self.model.vocab_size
            tokens.append(token)
        row.proposals = tokens[len(row.tokens) :]
        return list(row.proposals)

    def _next(self, row: ScriptedRow, tokens: Sequence[int]) -> int:
        return self.model.next_token(tokens, row.prompt_len, row.params, row.eos_token_ids, row.seed)

    def _prompt_logprobs(self, row: ScriptedRow, start: int, count: int) -> list[TokenLogprobs] | None:
        if row.params.prompt_logprobs is None:
            return None
        end = min(start + count + 1, row.prompt_len)
        return [_certain(token) for token in row.tokens[start + 1 : end]]


def _logprobs(row: ScriptedRow, new: Sequence[int]) -> list[TokenLogprobs] | None:
    return None if row.params.logprobs is None else [_certain(token) for token in new]


def _certain(token: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token, logprob=0.0, rank=1, top_ids=[token], top_logprobs=[0.0])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)

"""The conformance suite of executors, whose plans are written by hand: no scheduler is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.config import EngineConfig
from dovetail.contracts.executor import Executor, ExecutorInfo, Progress
from dovetail.errors import DovetailError
from dovetail.messages import TokenLogprobs
from dovetail.ops.random import signed64
from dovetail.ops.sampling import SamplingTensors, sample_tokens
from dovetail.plugins.manifest import Manifest
from dovetail.sampling_params import SamplingParams
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.oracle_decoder import OracleDecoder
from dovetail.testing.conformance.plan_writer import GREEDY, PlanWriter, ResultError
from dovetail.testing.conformance.subject import registered, selection_of
from dovetail.testing.conformance.suite import Suite, needs

DRAFTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorManifest(Manifest):
    """What is declared about an executor. Every capability is closed by default.

    Attributes:
        checkpoint: it loads the checkpoint of its configuration.
        logit_rules: it honours ``logit_bias``, ``allowed_token_ids`` and penalties.
        filters: it samples with temperature, top-k, top-p and min-p as the reference operation does.
        logprobs, prompt_logprobs: it reports log-probabilities.
        drafts: it proposes drafts, and verifies those of the plan.
    """

    checkpoint: bool = False
    logit_rules: bool = False
    filters: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    drafts: bool = False


class ExecutorSuite(Suite):
    """What every executor does with a stream of plans.

    It is given a configuration of a tiny model on the CPU platform. An executor that cannot run that overrides
    :meth:`config` and, with it, :meth:`next_token`.
    """

    contract = "executor"
    kind = "executors"

    def config(self, folder: Path, *, drafts: int = 0, windowed: bool = True) -> EngineConfig:
        """What the executor is constructed with.

        Args:
            folder: for a checkpoint.
            drafts: most drafts per step.
            windowed: whether the model should have a sliding-window group beside a full one, if that can be chosen.
        """
        hf_config = self._hf_config(windowed)
        return tiny.tiny_config(
            tiny.write_checkpoint(folder, hf_config),
            platform=registered("cpu").find("platforms").selection,
            attention=registered("cpu").find("attention").selection,
            hf_config=hf_config,
            spec_decoder=selection_of(OracleDecoder, "oracle") if drafts else None,
            num_speculative_tokens=drafts,
        )

    def next_token(
        self,
        tokens: Sequence[int],
        prompt_len: int,
        params: SamplingParams,
        seed: int,
        eos_token_ids: Sequence[int],
        *,
        windowed: bool = True,
    ) -> int:
        """The token that must follow, computed apart from the executor."""
        logits_V = tiny.dense_logits(tokens, self._hf_config(windowed))[-1]
        ruled_V = _ruled(logits_V, tokens, prompt_len, params, eos_token_ids)
        return int(sample_tokens(ruled_V.float().unsqueeze(0), _sampling(params, seed, len(tokens)))[0])

    def expected(
        self,
        prompt: Sequence[int],
        count: int,
        params: SamplingParams = GREEDY,
        *,
        seed: int = 0,
        eos_token_ids: Sequence[int] = (),
        windowed: bool = True,
    ) -> list[int]:
        """The first ``count`` tokens of a completion."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(
                self.next_token(tokens, len(prompt), params, seed, eos_token_ids, windowed=windowed)
            )
        return tokens[len(prompt) :]

    @contextmanager
    def loaded(
        self, folder: Path, *, drafts: int = 0, windowed: bool = True
    ) -> Iterator[tuple[PlanWriter, ExecutorInfo]]:
        """A loaded executor, closed in the end."""
        __tracebackhide__ = True
        executor: Executor = self.tested.cls(self.config(folder, drafts=drafts, windowed=windowed))
        try:
            info = executor.load(Progress())
            yield PlanWriter(executor, info), info
        except ResultError as error:
            self.fail(str(error))
        finally:
            executor.close()

    # ---- life

    def test_load(self, tmp_path: Path) -> None:
        """executor.1: load tells the size of its pool, and groups that hold every layer once; it reports progress."""
        config, progress = self.config(tmp_path), _Noted()
        executor = self.tested.cls(config)
        info = executor.load(progress)
        executor.close()
        self.check(isinstance(info, ExecutorInfo), f"load(): expected an ExecutorInfo, got {info!r}.")
        self.equal(info.block_size, config.block_size, "block_size after load()")
        pages, longest = -(-config.max_model_len // info.block_size) * len(info.groups), config.max_model_len
        self.check(info.num_blocks > pages, f"{info.num_blocks} blocks hold no request of {longest} tokens.")
        layers = sorted(layer for group in info.groups for layer in group.layers)
        self.equal(layers, list(range(len(layers))), "layers of all KV groups")
        self.check(bool(progress.notes), "load() reported no progress.")
        odd = [note for note in progress.notes if not 0 <= note[1] <= note[2]]
        self.equal(odd, [], "progress beyond its total")

    def test_close(self, tmp_path: Path) -> None:
        """executor.2: close may be called before load, and twice; a new executor can be loaded afterwards."""
        never = self.tested.cls(self.config(tmp_path))
        never.close()
        for _ in range(2):
            with self.loaded(tmp_path) as (writer, _):
                writer.enter(0, _prompt(9))
                self.equal(writer.finish(count=3)[0], self.expected(_prompt(9), 3), "tokens after a prompt of 9")
                executor = writer.executor
            executor.close()

    @needs("checkpoint")
    def test_missing_checkpoint(self, tmp_path: Path) -> None:
        """executor.3: a checkpoint that is not there fails load with a DovetailError that names it."""
        config = self.config(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        executor = self.tested.cls(config)
        try:
            executor.load(Progress())
        except DovetailError as error:
            self.check(str(tmp_path) in str(error), f"expected an error that names {tmp_path}, got: {error}")
        except Exception as error:  # noqa: BLE001  any other exception is the finding
            self.fail(f"no weights in {tmp_path}: expected a DovetailError, got {type(error).__name__}: {error}")
        else:
            self.fail(f"no weights in {tmp_path}: expected a DovetailError, but load() succeeded.")
        finally:
            executor.close()

    # ---- plans

    @pytest.mark.parametrize("length", [1, 15, 16, 17, 60])
    def test_prompt(self, tmp_path: Path, length: int) -> None:
        """executor.4: a prompt in one step, then one token per step, gives the model's greedy tokens."""
        with self.loaded(tmp_path) as (writer, _):
            writer.enter(2, _prompt(length))
            self._same(writer.finish(count=20)[2], self.expected(_prompt(length), 20), f"a prompt of {length}")

    @pytest.mark.parametrize("chunks", [(1, 1, 48), (16, 16, 18), (49, 1), (7, 13, 30)], ids=str)
    def test_prompt_in_chunks(self, tmp_path: Path, chunks: tuple[int, ...]) -> None:
        """executor.5: a prompt may be cut into steps anywhere; steps that do not reach its end give no token."""
        with self.loaded(tmp_path) as (writer, _):
            writer.enter(0, _prompt(50))
            for i, chunk in enumerate(chunks):
                got = writer.step({0: chunk}).token_ids[0]
                self.equal(len(got), int(i == len(chunks) - 1), f"number of tokens after chunk {i} of {chunks}")
            self._same(writer.finish(count=8)[0], self.expected(_prompt(50), 8), f"a prompt in chunks {chunks}")

    def test_batch(self, tmp_path: Path) -> None:
        """executor.6: requests in any order of slots, at any stage, are computed in one step, each as if alone."""
        lengths = {3: 20, 0: 1, 2: 33, 1: 9}
        with self.loaded(tmp_path) as (writer, _):
            for slot, length in lengths.items():
                writer.enter(slot, _prompt(length, slot))
            writer.step({3: 20, 0: 1})
            writer.step({2: 10, 3: 1, 1: 9})
            writer.step({1: 1, 2: 23, 0: 1, 3: 1})
            outputs = writer.finish([1, 3, 0, 2], count=8)
            for slot, length in lengths.items():
                self._same(outputs[slot], self.expected(_prompt(length, slot), 8), f"slot {slot} of a mixed batch")

    def test_idle_slots(self, tmp_path: Path) -> None:
        """executor.7: a request that sits out some steps goes on where it stopped."""
        with self.loaded(tmp_path) as (writer, _):
            for slot in range(3):
                writer.enter(slot, _prompt(12, slot))
            writer.step({0: 12, 1: 12, 2: 12})
            writer.finish([1], count=7)
            writer.finish([2, 0], count=4)
            for slot, output in writer.finish(count=9).items():
                self._same(output, self.expected(_prompt(12, slot), 9), f"slot {slot}, which sat out steps")

    def test_slots_are_used_again(self, tmp_path: Path) -> None:
        """executor.8: a slot that was freed takes a new request in the same plan, without a trace of the former."""
        noisy = SamplingParams(temperature=1.5, max_tokens=None, min_tokens=50, stop_token_ids=tuple(range(40)))
        with self.loaded(tmp_path) as (writer, _):
            writer.enter(1, _prompt(45, 5), noisy, seed=9)
            writer.finish(count=4)
            for round_ in range(3):
                writer.leave(1)
                writer.enter(1, _prompt(10 + round_, round_))
                expected = self.expected(_prompt(10 + round_, round_), 6)
                self._same(writer.finish(count=6)[1], expected, f"request {round_} after another in slot 1")

    def test_full_house(self, tmp_path: Path) -> None:
        """executor.9: every slot and the whole token budget may be used in one step, and contexts may reach their
        limit.
        """
        with self.loaded(tmp_path) as (writer, _):
            config = self.config(tmp_path)
            share = config.max_num_batched_tokens // config.max_num_seqs
            for slot in range(config.max_num_seqs):
                writer.enter(slot, _prompt(share, slot))
            writer.step(dict.fromkeys(range(config.max_num_seqs), share))
            room = config.max_model_len - share
            outputs = writer.finish(count=min(room, 20))
            for slot, output in outputs.items():
                self._same(output, self.expected(_prompt(share, slot), len(output)), f"slot {slot} of a full house")
            self._same(writer.finish([0], room)[0], self.expected(_prompt(share), room), "a context up to its limit")

    def test_prefix_hits(self, tmp_path: Path) -> None:
        """executor.10: a request starts behind blocks that another filled, even in the same step, or after it left."""
        with self.loaded(tmp_path) as (writer, info):
            size = info.block_size
            common = _prompt(2 * size)
            writer.enter(0, [*common, 5, 6])
            tails = {1: [9], 2: [3, 4, 5], 3: [1]}
            for slot, tail in tails.items():
                writer.enter(slot, [*common, *tail], shares=(0, 2))
            writer.step({1: 1, 0: 2 * size + 2})
            writer.step({2: 3, 0: 1})
            writer.leave(0)
            writer.step({3: 1, 1: 1})
            for slot, output in writer.finish(count=6).items():
                expected = self.expected([*common, *tails[slot]], 6)
                self._same(output, expected, f"slot {slot}, which shares {2 * size} tokens with slot 0")

    def test_resumption(self, tmp_path: Path) -> None:
        """executor.11: a preempted request comes back with its output among its known tokens, into another slot and
        other blocks, and goes on as if nothing had been.
        """
        params = SamplingParams(temperature=0.9, max_tokens=None)
        for wish in (GREEDY, params):
            expected = self.expected(_prompt(20), 12, wish, seed=77)
            with self.loaded(tmp_path) as (writer, _):
                writer.enter(0, _prompt(20), wish, seed=77)
                writer.finish(count=5)
                row = writer.leave(0)
                writer.enter(1, _prompt(8, 4))
                writer.finish([1], count=2)
                writer.enter(3, _prompt(20), wish, seed=77, output=row.output)
                writer.step({3: 7, 1: 1})
                what = f"resumed after {len(row.output)} tokens, temperature {wish.temperature}"
                self._same(writer.finish([3], count=12)[3], expected, what)

    def test_window_slides(self, tmp_path: Path) -> None:
        """executor.12: blocks that slid out of a group's window are taken away, and nothing changes."""
        with self.loaded(tmp_path) as (writer, info):
            windows = {group: kind.window for group, kind in enumerate(info.groups) if kind.window is not None}
            if not windows:
                self.lacks("groups with a window")
            writer.enter(0, _prompt(60))
            writer.enter(1, _prompt(30, 1))
            writer.step({0: 30, 1: 30})
            for _ in range(50):
                row = writer.rows[0]
                for group, window in windows.items():
                    writer.slide(0, group, max(0, row.computed - window + 1) // info.block_size)
                writer.step({0: row.left, 1: 1})
            self._same(writer.rows[0].output, self.expected(_prompt(60), 50), "a window that slid over 110 tokens")

    # ---- tokens

    def test_seeds(self, tmp_path: Path) -> None:
        """executor.13: sampled tokens depend on seed and position alone: not on slot, batch or step."""
        wishes = {slot: SamplingParams(temperature=0.7 + slot / 4, max_tokens=None) for slot in range(4)}
        seeds = {0: 1, 1: 2**63 + 5, 2: 0, 3: 1}
        with self.loaded(tmp_path) as (writer, _):
            for slot, wish in wishes.items():
                writer.enter(slot, _prompt(10, slot), wish, seed=seeds[slot])
            writer.step({2: 10, 0: 4})
            for slot, output in writer.finish(count=8).items():
                expected = self.expected(_prompt(10, slot), 8, wishes[slot], seed=seeds[slot])
                self._same(output, expected, f"seed {seeds[slot]}, temperature {wishes[slot].temperature}")

    @needs("filters")
    def test_filters(self, tmp_path: Path) -> None:
        """executor.14: top-k, top-p and min-p are honoured per request, beside requests without them."""
        filters: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {}]
        with self.loaded(tmp_path) as (writer, _):
            wishes = [SamplingParams(temperature=1.4, max_tokens=None, **given) for given in filters]
            for slot, wish in enumerate(wishes):
                writer.enter(slot, _prompt(10), wish, seed=slot)
            for slot, output in writer.finish(count=10).items():
                expected = self.expected(_prompt(10), 10, wishes[slot], seed=slot)
                self._same(output, expected, f"temperature 1.4 with {filters[slot] or 'no filter'}")

    @needs("logit_rules")
    def test_logit_rules(self, tmp_path: Path) -> None:
        """executor.15: logit_bias, allowed_token_ids and penalties are honoured per request."""
        rules: list[dict[str, Any]] = [
            {"logit_bias": {3: 60.0, 4: 60.0, 5: 60.0}, "frequency_penalty": 2.0},
            {"allowed_token_ids": (5, 6, 7, 90)},
            {"presence_penalty": 1.5, "repetition_penalty": 1.8},
            {},
        ]
        with self.loaded(tmp_path) as (writer, _):
            wishes = [SamplingParams(temperature=0.0, max_tokens=None, **given) for given in rules]
            for slot, wish in enumerate(wishes):
                writer.enter(slot, _prompt(12), wish)
            writer.step({3: 12, 1: 5, 0: 12})
            for slot, output in writer.finish(count=10).items():
                self._same(output, self.expected(_prompt(12), 10, wishes[slot]), f"with {rules[slot] or 'no rule'}")

    def test_min_tokens(self, tmp_path: Path) -> None:
        """executor.16: end-of-sequence and stop tokens are masked until min_tokens exist, and no longer."""
        plain = self.expected(_prompt(10), 10)
        late = next(token for token in plain[3:] if token not in plain[:3])
        for stops in (plain[:2], [late, late]):
            params = SamplingParams(temperature=0.0, max_tokens=None, min_tokens=3, stop_token_ids=(stops[1],))
            with self.loaded(tmp_path) as (writer, _):
                writer.enter(0, _prompt(10), params, eos_token_ids=(stops[0],))
                output = writer.finish(count=10)[0]
            self.check(not set(stops) & set(output[:3]), f"stop tokens {stops} among the first 3: {output}")
            expected = self.expected(_prompt(10), 10, params, eos_token_ids=(stops[0],))
            self._same(output, expected, f"min_tokens 3 with stop tokens {stops}")

    @needs("logprobs")
    def test_logprobs(self, tmp_path: Path) -> None:
        """executor.17: requests that ask get, per token, its log-probability and rank in the model's own distribution,
        and the most likely tokens in order; others get None.
        """
        wishes = {0: SamplingParams(temperature=1.2, max_tokens=None, logprobs=3), 1: GREEDY}
        wishes[2] = SamplingParams(temperature=0.0, max_tokens=None, logprobs=0)
        with self.loaded(tmp_path) as (writer, _):
            for slot, wish in wishes.items():
                writer.enter(slot, _prompt(10, slot), wish, seed=4)
            for _ in range(4):
                before = {slot: list(row.tokens) for slot, row in writer.rows.items()}
                result = writer.step({slot: writer.rows[slot].left for slot in (2, 0, 1)})
                self.equal(result.logprobs[2], None, "logprobs of a request that did not ask")
                for column, slot in ((1, 0), (0, 2)):
                    scores, tokens = result.logprobs[column], result.token_ids[column]
                    self.check(scores is not None, f"logprobs of slot {slot}, which asked, are None.")
                    logits_V = tiny.dense_logits(before[slot], tiny.WINDOWED)[-1]
                    self._scored((scores or [])[0], tokens[0], logits_V, wishes[slot].logprobs or 0)

    @needs("prompt_logprobs")
    def test_prompt_logprobs(self, tmp_path: Path) -> None:
        """executor.18: requests that ask get entries for the prompt's own tokens from the second on, chunk by chunk."""
        params = SamplingParams(temperature=0.0, max_tokens=None, prompt_logprobs=2)
        prompt = _prompt(30)
        logits = tiny.dense_logits(prompt, tiny.WINDOWED)
        with self.loaded(tmp_path) as (writer, _):
            writer.enter(0, prompt, params)
            writer.enter(1, _prompt(5, 1))
            done = 0
            for chunk in (1, 12, 16, 1):
                result = writer.step({1: writer.rows[1].left, 0: chunk})
                self.equal(result.prompt_logprobs[0], None, "prompt_logprobs of a request that did not ask")
                scores = result.prompt_logprobs[1] or []
                self.equal(len(scores), min(chunk, 29 - done), f"prompt_logprobs of tokens {done} to {done + chunk}")
                for i, score in enumerate(scores):
                    self._scored(score, prompt[done + i + 1], logits[done + i], 2)
                done += chunk
            after = writer.step({0: 1}).prompt_logprobs[0]
            self.check(not after, f"prompt_logprobs after the prompt's end: expected none, got {after}.")

    @needs("drafts")
    def test_drafts(self, tmp_path: Path) -> None:
        """executor.19: drafts change no token of any request, greedy or sampled; right ones are accepted and wrong ones
        replaced, in one step.
        """
        wishes = {0: GREEDY, 1: SamplingParams(temperature=0.8, max_tokens=None), 2: GREEDY}
        accepted = rejected = 0
        with self.loaded(tmp_path, drafts=DRAFTS, windowed=False) as (writer, _):
            for slot, wish in wishes.items():
                writer.enter(slot, _prompt(14 + slot, slot), wish, seed=slot)
            writer.step({0: 14, 1: 3})
            while any(len(row.output) < 15 for row in writer.rows.values()):
                rows = writer.rows
                drafts = {slot: row.proposals for slot, row in rows.items() if row.proposals}
                result = writer.step({slot: row.left for slot, row in rows.items()}, drafts)
                for slot, tokens in zip(rows, result.token_ids, strict=True):
                    accepted += len(tokens) - 1
                    rejected += len(drafts.get(slot, [])) + 1 - len(tokens)
                self._proposed(result.drafts)
            for slot, wish in wishes.items():
                prompt = _prompt(14 + slot, slot)
                expected = self.expected(prompt, 15, wish, seed=slot, windowed=False)
                self._same(writer.rows[slot].output[:15], expected, f"with drafts, temperature {wish.temperature}")
        self.check(accepted > 0, f"no draft was accepted, of {rejected}.")
        self.check(rejected > 0, f"all {accepted} drafts were accepted, wrong ones too.")

    @needs("drafts")
    def test_some_drafts(self, tmp_path: Path) -> None:
        """executor.20: a plan may verify fewer drafts than were proposed, or none."""
        with self.loaded(tmp_path, drafts=DRAFTS, windowed=False) as (writer, _):
            writer.enter(0, _prompt(9))
            writer.step({0: 9})
            for keep in (1, 0, 2, 0, 3, 1):
                proposals = writer.rows[0].proposals[:keep]
                writer.step({0: writer.rows[0].left}, {0: proposals} if proposals else {})
            output = writer.rows[0].output
            self._same(output, self.expected(_prompt(9), len(output), windowed=False), "with some of the drafts")

    @needs("checkpoint")
    def test_errors(self, tmp_path: Path) -> None:
        """executor.21: a request whose logits are not finite ends with an error in its column and no token; the others
        are unharmed, and so is whoever gets its slot and blocks next.
        """
        prompts = {0: _prompt(24), 1: _prompt(20, 1), 2: _prompt(17, 2)}
        expected = {slot: self.expected(prompt, 5) for slot, prompt in prompts.items()}
        used = {token for tokens in (*prompts.values(), *expected.values()) for token in tokens}
        bad = next(token for token in range(tiny.VOCAB_SIZE) if token not in used)
        config = self.config(tmp_path)
        tiny.write_checkpoint(tmp_path, self._hf_config(True), poisoned=bad)
        executor = self.tested.cls(config)
        try:
            writer = PlanWriter(executor, executor.load(Progress()))
            for slot, prompt in {**prompts, 1: [bad, *_prompt(20)]}.items():
                writer.enter(slot, prompt)
            result = writer.step({slot: row.left for slot, row in writer.rows.items()})
            self.equal(sorted(result.errors), [1], "columns with errors, where column 1 has logits of NaN")
            self.check(bool(result.errors[1].strip()), "the error says nothing.")
            writer.leave(1)
            writer.enter(1, prompts[1])
            for slot, output in writer.finish(count=5).items():
                self._same(output, expected[slot], f"slot {slot}, beside a request with NaN, or after it")
        finally:
            executor.close()

    def test_ahead(self, tmp_path: Path) -> None:
        """executor.22: steps that were submitted before the results of earlier ones are read go on from the tokens that
        those sample; a result that is not wanted any more harms nobody.
        """
        with self.loaded(tmp_path) as (writer, _):
            for slot in range(3):
                writer.enter(slot, _prompt(14 + slot, slot))
            writer.step({0: 14, 1: 15, 2: 16})
            writer.decode_ahead([2, 0, 1], count=7, depth=2)
            writer.leave(1)
            writer.enter(1, _prompt(9, 7))
            writer.step({1: 9, 0: 1, 2: 1})
            writer.decode_ahead([0, 1, 2], count=4, depth=3)
            for slot, prompt in ((0, _prompt(14)), (1, _prompt(9, 7)), (2, _prompt(16, 2))):
                output = writer.rows[slot].output
                self._same(output, self.expected(prompt, len(output)), f"slot {slot}, with steps under way")

    # ---- shared steps

    def _hf_config(self, windowed: bool) -> dict[str, object]:
        return dict(tiny.WINDOWED if windowed else tiny.CONFIG)

    def _same(self, output: Sequence[int], expected: Sequence[int], what: str) -> None:
        __tracebackhide__ = True
        for i, (token, right) in enumerate(zip(output, expected, strict=True)):
            if token != right:
                self.fail(f"{what}: output {i} of {len(expected)}: expected {right}, got {token}; {list(output)}.")

    def _scored(self, score: TokenLogprobs, token: int, logits_V: Tensor, count: int) -> None:
        __tracebackhide__ = True
        logprobs_V = logits_V.log_softmax(-1)
        top = logprobs_V.topk(count) if count else None
        self.equal(score.token_id, token, "token_id of a logprob entry")
        self.equal(score.rank, int((logprobs_V > logprobs_V[token]).sum()) + 1, f"rank of token {token}")
        self.equal(list(score.top_ids), [] if top is None else top.indices.tolist(), f"the {count} most likely tokens")
        expected = [float(logprobs_V[token]), *([] if top is None else top.values.tolist())]
        for got, want in zip([score.logprob, *score.top_logprobs], expected, strict=True):
            self.check(math.isclose(got, want, abs_tol=1e-3), f"a log-probability: expected {want:.5f}, got {got:.5f}.")

    def _proposed(self, drafts: Sequence[Sequence[int]]) -> None:
        __tracebackhide__ = True
        for proposals in drafts:
            self.check(len(proposals) <= DRAFTS, f"{len(proposals)} drafts were proposed, of at most {DRAFTS}.")


class _Noted(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int, int]] = []

    def update(self, stage: str, done: int, total: int) -> None:
        self.notes.append((stage, done, total))


def _prompt(length: int, seed: int = 0) -> list[int]:
    """Different prompts for different seeds, within the first 100 tokens."""
    return [(31 * seed + 7 * i * i + 3 * i + 11) % 97 for i in range(length)]


def _ruled(
    logits_V: Tensor, tokens: Sequence[int], prompt_len: int, params: SamplingParams, eos_token_ids: Sequence[int]
) -> Tensor:
    """Bias, allowed tokens, min_tokens and penalties, one token at a time."""
    ruled = []
    output = list(tokens[prompt_len:])
    masked = {*eos_token_ids, *params.stop_token_ids} if len(output) < params.min_tokens else set()
    for token, logit in enumerate(logits_V.tolist()):
        value = logit + (params.logit_bias or {}).get(token, 0.0)
        if token in masked or (params.allowed_token_ids is not None and token not in params.allowed_token_ids):
            value = -math.inf
        if token in tokens:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
        ruled.append(value)
    return torch.tensor(ruled, dtype=torch.float64)


def _sampling(params: SamplingParams, seed: int, position: int) -> SamplingTensors:
    return SamplingTensors(
        temperature_S=torch.tensor([params.temperature]),
        top_k_S=torch.tensor([params.top_k]),
        top_p_S=torch.tensor([params.top_p]),
        min_p_S=torch.tensor([params.min_p]),
        seeds_S=torch.tensor([signed64(seed)]),
        positions_S=torch.tensor([position]),
        all_greedy=params.greedy,
        any_filter=not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
    )

"""The conformance suite of speculative decoders."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dovetail.config import EngineConfig
from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder
from dovetail.errors import ConfigError
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.drafting import MAX_MODEL_LEN, NUM_DRAFTS, ScratchDraft, Slots
from dovetail.testing.conformance.small_engine import SIZES, core_part, generate, model_config
from dovetail.testing.conformance.suite import Suite, needs

JUNK: tuple[Any, ...] = ("junk", ["junk"], -1, None)
"""Values that hardly any option may have."""
SAMPLES = 1000
"""Draws that are compared with the probabilities they come from."""


class SpecDecoderSuite(Suite):
    """Holds a speculative decoder to its contract.

    Attributes:
        options: its own section of ``--speculative-config``, where it differs from the manifest's defaults.
    """

    contract: ClassVar[str] = "specdec"
    kind: ClassVar[str] = "spec_decoders"
    options: ClassVar[Mapping[str, Any]] = {}

    # ---- proposals

    def test_options(self) -> None:
        """specdec.1: an option with an absurd value is refused with a ConfigError that names it, or harmless."""
        for name in self._section():
            for junk in JUNK:
                self._accepts_or_names({**self._section(), name: junk}, name)

    def test_proposals(self) -> None:
        """specdec.2: there is one list per request, of at most ``limit`` plain integers within the vocabulary."""
        slots, order = self._filled(), [4, 1, 0, 3]
        for limit in ([4, 4, 4, 4], [1, 4, 0, 2], [3, 3, 1, 1]):
            drafts = self._decoder().propose(slots.state(order, limit))
            self.equal(len(drafts.token_ids), len(order), f"number of lists for {len(order)} requests")
            for ids, most in zip(drafts.token_ids, limit, strict=True):
                self.check(type(ids) is list and all(type(i) is int for i in ids), f"{ids!r} is no list of integers.")
                self.check(len(ids) <= most, f"{len(ids)} drafts where the limit is {most}.")
                foreign = [i for i in ids if not 0 <= i < tiny.VOCAB_SIZE]
                self.equal(foreign, [], f"drafts outside of the vocabulary of {tiny.VOCAB_SIZE}")

    def test_drafts_something(self) -> None:
        """specdec.3: text that repeats itself is drafted for, and nothing is where the limit is 0."""
        slots = self._filled()
        drafted = self._decoder().propose(slots.state([0, 1, 3, 4])).token_ids
        self.check(any(drafted), "nothing was drafted for any of four texts that repeat themselves.")
        none = self._decoder().propose(slots.state([0, 1, 3, 4], [0] * 4)).token_ids
        self.equal(none, [[], [], [], []], "drafts where the limit is 0")

    def test_repeats(self) -> None:
        """specdec.4: the same state gives the same drafts, whatever was decided before."""
        slots = self._filled(temperature=0.8)
        proposals: list[Drafts] = []
        for seed in (1, 2):
            random.seed(seed)
            torch.manual_seed(seed)
            proposals.append(self._decoder().propose(slots.state([0, 1, 3])))
        self._same(proposals[1], proposals[0], "drafts of a second decoder")

    def test_requests_are_independent(self) -> None:
        """specdec.5: drafts depend on the request alone: not on its slot, its place in the batch, or other requests."""
        counting = list(range(40, 60))
        crowd = self._filled()
        crowd.put(3, [*counting, 7, 8, 9, 10])
        for text in (_text(30, 2), counting):
            alone = Slots()
            alone.put(0, text, temperature=0.8, seed=7)
            crowd.put(5, text, temperature=0.8, seed=7)
            expected = self._decoder().propose(alone.state([0])).token_ids
            for order in ([5, 0, 3], [3, 5], [0, 1, 3, 4, 5]):
                got = self._decoder().propose(crowd.state(order)).token_ids[order.index(5)]
                self.equal([got], expected, f"drafts in slot 5 among {order}, and alone in slot 0")

    @pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "rejected"])
    def test_growth(self, accepted: bool) -> None:
        """specdec.6: after any number of new tokens, whether drafted before or others in their place, drafts are those
        of a decoder that sees the request for the first time.
        """
        slots, decoder = self._filled(temperature=0.8), self._decoder()
        texts = {slot: _text(20, slot) for slot in (1, 4)}
        for step in range(8):
            for slot, text in texts.items():
                slots.put(slot, text, temperature=0.8)
            order = [1, 4] if step % 3 else [4]
            state = slots.state(order)
            got = decoder.propose(state)
            fresh = self._decoder().propose(state)
            self._same(got, fresh, f"drafts in step {step}, with the tokens before {_fate(accepted)}")
            for slot, ids in zip(order, got.token_ids, strict=True):
                texts[slot] += _next(texts[slot], ids if accepted else [], step)

    def test_release(self) -> None:
        """specdec.7: a released slot is forgotten: the next request there gets the drafts of a new decoder."""
        first = _text(40, 3)
        others = {"a longer one": _text(60, 5), "a shorter one": _text(12, 6), "the same again": first}
        others |= {"one with the same beginning": [*first[:30], *_text(12, 9)], "one of equal length": _text(40, 7)}
        for name, text in others.items():
            slots, decoder = self._filled(), self._decoder()
            slots.put(2, first)
            decoder.propose(slots.state([1, 2, 4]))
            decoder.release([2])
            slots.put(2, text)
            expected = self._decoder().propose(slots.state([2, 4]))
            self._same(decoder.propose(slots.state([2, 4])), expected, f"drafts for {name} in a released slot")

    def test_release_of_many(self) -> None:
        """specdec.8: several slots may be released at once, in any order, drafted for before or not."""
        slots, decoder = self._filled(), self._decoder()
        decoder.propose(slots.state([0, 1]))
        decoder.release([5, 1, 2])
        for slot in (1, 2, 5):
            slots.put(slot, _text(25, 20 + slot))
        expected = self._decoder().propose(slots.state([0, 1, 2, 5]))
        self._same(decoder.propose(slots.state([0, 1, 2, 5])), expected, "drafts after three slots were released")

    def test_context(self) -> None:
        """specdec.9: requests of any length are drafted for, from one token to the longest context."""
        for length in (1, 2, 3, MAX_MODEL_LEN // 2, MAX_MODEL_LEN - 3, MAX_MODEL_LEN - 1, MAX_MODEL_LEN):
            slots = self._filled()
            slots.put(2, _text(length, 1))
            state = slots.state([2, 0])
            ids = self._decoder().propose(state).token_ids[0]
            self.check(len(ids) <= state.limit[0], f"{len(ids)} drafts after {length} of {MAX_MODEL_LEN} tokens.")

    def test_state_is_only_read(self) -> None:
        """specdec.10: the verified tokens and everything else in the state stay as they are."""
        slots, order, limit = self._filled(temperature=0.8), [4, 1, 0], [4, 2, 4]
        state, given = slots.state(order, limit), slots.state(order, limit)
        given.tokens_SL, given.num_tokens_S = state.tokens_SL.clone(), state.num_tokens_S.clone()
        given.temperature_S, given.seeds_S = state.temperature_S.clone(), state.seeds_S.clone()
        self._decoder().propose(state)
        self.equal((list(state.slots), list(state.limit)), (order, limit), "slots and limit afterwards")
        for name in ("num_tokens_S", "temperature_S", "seeds_S"):
            self.check(torch.equal(getattr(state, name), getattr(given, name)), f"{name} was changed.")
        for slot in order:
            verified = slice(0, int(given.num_tokens_S[slot]))
            same = torch.equal(state.tokens_SL[slot, verified], given.tokens_SL[slot, verified])
            self.check(same, f"verified tokens of slot {slot} were changed.")

    # ---- probabilities

    def test_undeclared_probabilities(self) -> None:
        """specdec.11: only a decoder that declares probabilities returns any."""
        if self.manifest.probabilities:
            self.lacks("drafts without probabilities")
        for temperature in (0.0, 0.8):
            drafts = self._decoder().propose(self._filled(temperature=temperature).state([0, 1, 4]))
            self.check(drafts.probs is None, f"probabilities at temperature {temperature}, which are not declared.")

    @needs("probabilities")
    def test_probabilities(self) -> None:
        """specdec.12: each draft has a float32 distribution over the vocabulary, in which it has a chance."""
        slots, order = self._filled(temperature=0.8), [4, 1, 0]
        slots.put(1, _text(20, 1))
        drafts = self._decoder().propose(slots.state(order, [4, 4, 2]))
        probs = self._probs(drafts)
        shape = (len(order), NUM_DRAFTS, tiny.VOCAB_SIZE)
        self.equal((tuple(probs.shape), probs.dtype), (shape, torch.float32), "shape and dtype of the probabilities")
        for entry, (slot, ids) in enumerate(zip(order, drafts.token_ids, strict=True)):
            for i, token in enumerate(ids if slots.temperature_S[slot] > 0 else []):
                row = probs[entry, i]
                total, least = float(row.double().sum()), float(row.min())
                what = f"probabilities of draft {i} in slot {slot}"
                self.check(abs(total - 1) < 1e-4 and least >= 0, f"{what} sum to {total:.6f}, the least is {least:g}.")
                self.check(float(row[token]) > 0, f"{what} give token {token}, which was drafted, no chance.")

    @needs("probabilities")
    @pytest.mark.parametrize("temperature", [0.5, 1.2])
    def test_draws(self, temperature: float) -> None:
        """specdec.13: drafts are drawn from the probabilities returned with them (chi-square over many seeds)."""
        text, count = _text(3, 3), 100
        slots = Slots(count)
        counts: Counter[int] = Counter()
        first: Tensor | None = None
        for round_ in range(SAMPLES // count):
            for slot in range(count):
                slots.put(slot, text, temperature=temperature, seed=round_ * count + slot)
            drafts = self._decoder(slots).propose(slots.state(range(count), [1] * count))
            probs = self._probs(drafts)[:, 0]
            first = probs[0] if first is None else first
            self.near(probs, first.expand_as(probs), "probabilities of equal requests with other seeds", 1e-5)
            counts.update(ids[0] for ids in drafts.token_ids if ids)
        assert first is not None
        self._fits(counts, first.double())

    # ---- draft models

    @needs("needs_draft_model")
    def test_draft_model_is_used_as_promised(self) -> None:
        """specdec.14: the draft model catches up once per proposal, and is extended by what is proposed."""
        model = ScratchDraft()
        slots, limit = self._filled(temperature=0.8), [4, 1, 0, 3]
        drafts = self._decoder(draft=model).propose(slots.state([0, 1, 3, 4], limit))
        self.equal(model.calls, 1, "calls of catch_up")
        for entry, extended in model.extensions.items():
            kept = drafts.token_ids[entry][: len(extended)]
            self.equal(extended[: len(kept)], kept, f"tokens that extend() got for entry {entry}, and its drafts")

    @needs("needs_draft_model")
    def test_draft_model_without_room(self) -> None:
        """specdec.15: requests that the draft model passes over get no drafts, and the others get theirs."""
        slots, order = self._filled(temperature=0.8), [0, 1, 3, 4]
        expected = self._decoder().propose(slots.state(order)).token_ids
        for passed_over in ([1], [0, 4], order):
            decoder = self._decoder(draft=ScratchDraft(passed_over))
            got = decoder.propose(slots.state(order)).token_ids
            wanted = [[] if slot in passed_over else ids for slot, ids in zip(order, expected, strict=True)]
            self.equal(got, wanted, f"drafts where slots {passed_over} of {order} are passed over")

    # ---- engines

    @pytest.mark.parametrize("room", [None, 50], ids=["roomy", "preempted"])
    def test_greedy_output(self, room: int | None, tmp_path: Path) -> None:
        """specdec.16: greedy tokens of an engine are those without speculation, also when requests are preempted."""
        self._unchanged(tmp_path, room, temperature=0.0)

    def test_sampled_output(self, tmp_path: Path) -> None:
        """specdec.17: seeded, sampled tokens of an engine are those without speculation; with probabilities, they are
        the same every time.
        """
        slots = self._filled(temperature=0.8)
        if self._decoder().propose(slots.state([0, 1])).probs is None:
            self._unchanged(tmp_path, None, temperature=0.8)
            return
        config = self._engine(tmp_path, None, speculates=True)
        runs = [generate(config, _prompts(), max_tokens=16, temperature=0.8) for _ in range(2)]
        self.equal(runs[1], runs[0], "sampled tokens of a second run")

    # ---- helpers

    def _section(self) -> dict[str, Any]:
        defaults = {k: v for k, v in self.manifest.defaults.items() if k != "num_speculative_tokens"}
        return {**defaults, **self.options}

    def _decoder(
        self, slots: Slots | None = None, *, draft: ScratchDraft | None = None, section: Mapping[str, Any] | None = None
    ) -> SpecDecoder:
        config = SpecConfig(
            num_speculative_tokens=NUM_DRAFTS,
            max_num_seqs=6 if slots is None else len(slots.num_tokens_S),
            max_model_len=MAX_MODEL_LEN,
            vocab_size=tiny.VOCAB_SIZE,
            options=self._section() if section is None else section,
            draft=(draft or ScratchDraft()) if self.manifest.needs_draft_model else None,
        )
        decoder: SpecDecoder = self.tested.cls(config, torch.device("cpu"))
        return decoder

    def _filled(self, *, temperature: float = 0.0) -> Slots:
        """Slots 0, 1, 3 and 4 are taken by requests whose text repeats itself."""
        slots = Slots()
        for slot in (0, 1, 3, 4):
            slots.put(slot, _text(15 + 9 * slot, slot), temperature=temperature)
        return slots

    def _probs(self, drafts: Drafts) -> Tensor:
        if drafts.probs is None:
            self.lacks("probabilities (with these options)")
        assert drafts.probs is not None
        return drafts.probs

    def _same(self, got: Drafts, expected: Drafts, what: str) -> None:
        __tracebackhide__ = True
        self.equal(got.token_ids, expected.token_ids, what)
        self.equal(got.probs is None, expected.probs is None, f"whether there are probabilities with {what}")
        if got.probs is not None and expected.probs is not None:
            self.near(got.probs, expected.probs, f"probabilities of {what}", 1e-4)

    def _accepts_or_names(self, section: dict[str, Any], name: str) -> None:
        __tracebackhide__ = True
        try:
            self._decoder(section=section).propose(self._filled().state([0, 1]))
        except ConfigError as error:
            self.check(name in str(error), f"{section!r}: the refusal does not name {name!r}: {error}")
        except Exception as error:  # noqa: BLE001  whatever else a plugin raises is what this looks for
            self.fail(f"{section!r}: expected a ConfigError naming {name!r}, got {type(error).__name__}: {error}")

    def _fits(self, counts: Counter[int], probs_V: Tensor) -> None:
        """A chi-square test at a level that no sound decoder fails with the fixed seeds of this suite."""
        __tracebackhide__ = True
        total = counts.total()
        self.check(total > SAMPLES // 2, f"only {total} of {SAMPLES} requests got a draft.")
        expected_V = total * probs_V
        observed_V = torch.zeros_like(expected_V)
        for token, count in counts.items():
            observed_V[token] = count
        often = expected_V >= 5
        pairs = [*zip(observed_V[often].tolist(), expected_V[often].tolist(), strict=True)]
        pairs.append((float(observed_V[~often].sum()), max(float(expected_V[~often].sum()), 0.5)))
        statistic = sum((o - e) ** 2 / e for o, e in pairs)
        freedom = len(pairs) - 1
        # Wilson and Hilferty 1931: the cube root is close to normal; 4 standard deviations.
        allowed = freedom * (1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5) ** 3
        self.check(
            statistic < allowed,
            f"{total} drafts do not follow their probabilities: chi-square is {statistic:.1f} with {freedom} degrees "
            f"of freedom, and {allowed:.1f} is allowed.",
        )

    def _unchanged(self, folder: Path, room: int | None, **params: Any) -> None:
        plain = generate(self._engine(folder, room, speculates=False), _prompts(), max_tokens=24, **params)
        got = generate(self._engine(folder, room, speculates=True), _prompts(), max_tokens=24, **params)
        for prompt, ours, expected in zip(_prompts(), got, plain, strict=True):
            self.equal(ours, expected, f"tokens after a prompt of {len(prompt)}, with and without speculation")

    def _engine(self, folder: Path, room: int | None, *, speculates: bool) -> EngineConfig:
        """The tiny model, with the decoder under test and, as a draft model, the same model without a window.

        Args:
            room: KV blocks of the model; None leaves enough for all requests.
        """
        changes: dict[str, Any] = {}
        if speculates:
            changes |= {"spec_decoder": self.tested.selection, "spec_options": self._section()}
            changes["num_speculative_tokens"] = NUM_DRAFTS
            if self.manifest.needs_draft_model:
                changes["draft"] = _tiny_config(folder / "draft", tiny.CONFIG)
        if room is not None:
            block = 2 * tiny.KV_HEADS * tiny.HEAD_SIZE * 4 * SIZES["block_size"]
            changes["kv_cache_memory"] = room * block * (2 if "draft" in changes else 1)
        return _tiny_config(folder, tiny.WINDOWED, **changes)


def _tiny_config(folder: Path, hf_config: Mapping[str, Any], **changes: Any) -> EngineConfig:
    folder.mkdir(exist_ok=True)
    tiny.write_checkpoint(folder, hf_config)
    part = core_part("dovetail.testing.conformance.tiny:TinyModel")
    return model_config(part, hf_config, folder, tiny.TinyModel.facts(hf_config), **changes)


def _prompts() -> list[list[int]]:
    return [_text(length, seed) for seed, length in enumerate((20, 3, 33, 47))]


def _text(length: int, seed: int) -> list[int]:
    """Tokens in which phrases come again and again."""
    source = random.Random(seed)
    phrases = [[source.randrange(tiny.VOCAB_SIZE) for _ in range(4)] for _ in range(2)]
    text: list[int] = []
    while len(text) < length:
        text += source.choice(phrases)
    return text[:length]


def _next(text: Sequence[int], accepted: Sequence[int], step: int) -> list[int]:
    """Tokens of one step: drafts that were accepted, and one more."""
    return [*accepted, (text[step] + 1) % tiny.VOCAB_SIZE if step % 2 else text[-5]]


def _fate(accepted: bool) -> str:
    return "accepted" if accepted else "rejected"

"""The suite of speculative decoders passes sound ones and catches broken ones, each by the scenario that it breaks."""

import random
from collections.abc import Sequence

import pytest
import torch

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import ConfigError
from dovetail.ops.random import Stream, gumbel, row_keys
from dovetail.plugins.manifest import SpecDecoderManifest
from dovetail.testing.conformance import SpecDecoderSuite, unregistered
from dovetail.testing.conformance.run import run

COPIES = SpecDecoderManifest(name="copies", summary="For a test.", defaults={"num_speculative_tokens": 4, "match": 2})
DRAWS = SpecDecoderManifest(name="draws", summary="For a test.", probabilities=True)
FOLLOWS = SpecDecoderManifest(name="follows", summary="For a test.", needs_draft_model=True)


class Copies(SpecDecoder):
    """Prompt lookup over copies of each request's tokens, which grow with the request."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        self.match = config.options["match"]
        if not isinstance(self.match, int) or self.match < 1:
            raise ConfigError(f"--speculative-config has match {self.match!r}; give a whole number of at least 1.")
        self.config = config
        self.copies: dict[int, list[int]] = {}

    def propose(self, state: SpecState) -> Drafts:
        drafts = []
        for i, (slot, limit) in enumerate(zip(state.slots, state.limit, strict=True)):
            copy = self.copies.setdefault(slot, [])
            copy += self.unseen(state, i, slot, len(copy))
            drafts.append(self.continuation(copy)[:limit])
        return Drafts(token_ids=drafts)

    def unseen(self, state, entry, slot, start):
        return state.tokens_SL[slot, start : int(state.num_tokens_S[slot])].tolist()

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.copies.pop(slot, None)

    def continuation(self, known):
        last = known[-self.match :]
        for end in range(len(known) - 1, self.match - 1, -1):
            if known[end - self.match : end] == last:
                return known[end:]
        return []


class Draws(SpecDecoder):
    """Draws from a distribution over the tokens of the request, hands it on, and remembers nothing."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        self.config = config

    def propose(self, state: SpecState) -> Drafts:
        shape = (len(state.slots), self.config.num_speculative_tokens, self.config.vocab_size)
        probs, drafts = torch.full(shape, 1 / shape[2]), []
        for entry, (slot, limit) in enumerate(zip(state.slots, state.limit, strict=True)):
            length = int(state.num_tokens_S[slot])
            weights_V = state.tokens_SL[slot, :length].bincount(minlength=shape[2]) * 3.0
            temperature = float(state.temperature_S[slot]) or 1.0
            probs[entry] = (weights_V / temperature).softmax(-1)
            positions = length + torch.arange(limit)
            drafts.append(self.draw(weights_V, temperature, state.seeds_S[slot].expand(limit), positions))
        return Drafts(token_ids=drafts, probs=self.returned(probs))

    def draw(self, weights_V, temperature, seeds, positions):
        noise = gumbel(row_keys(seeds, positions, Stream.DRAFT), torch.arange(len(weights_V)))
        return (noise + weights_V / temperature).argmax(-1).tolist()

    def returned(self, probs):
        return probs

    def release(self, slots: Sequence[int]) -> None:
        """Nothing to forget."""


class Follows(SpecDecoder):
    """The draft model's most likely tokens."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        assert config.draft is not None
        self.draft = config.draft

    def propose(self, state: SpecState) -> Drafts:
        drafts: list[list[int]] = [[] for _ in state.slots]
        entries, logits_RV = self.draft.catch_up(state)
        if not entries:
            return Drafts(token_ids=drafts)
        tokens = [logits_RV.argmax(-1)]
        for _ in range(1, max(state.limit[i] for i in entries)):
            tokens.append(self.extend(tokens[-1]).argmax(-1))
        for i, ids in zip(entries, torch.stack(tokens, 1).tolist(), strict=True):
            drafts[i] = ids[: state.limit[i]]
        return Drafts(token_ids=drafts)

    def extend(self, tokens_R):
        return self.draft.extend(tokens_R)

    def release(self, slots: Sequence[int]) -> None:
        """The core keeps the cache."""


class TrustsItsOptions(Copies):
    """specdec.1"""

    def __init__(self, config, device):
        self.match = config.options["match"] + 0
        self.config, self.copies = config, {}


class NamesNoOption(Copies):
    """specdec.1"""

    def __init__(self, config, device):
        try:
            super().__init__(config, device)
        except ConfigError:
            raise ConfigError("bad value") from None


class OneTooMany(Copies):
    """specdec.2"""

    def propose(self, state):
        state.limit = [limit + 1 for limit in state.limit]
        return super().propose(state)


class Foreign(Copies):
    """specdec.2"""

    def continuation(self, known):
        return [token + 64 for token in super().continuation(known)]


class Arrays(Copies):
    """specdec.2"""

    def propose(self, state):
        return Drafts(token_ids=[list(torch.tensor(ids)) for ids in super().propose(state).token_ids])


class LeavesOutEmptyOnes(Copies):
    """specdec.3"""

    def propose(self, state):
        return Drafts(token_ids=[ids for ids in super().propose(state).token_ids if ids])


class NeverDrafts(Copies):
    """specdec.3"""

    def continuation(self, known):
        return []


class AlwaysDrafts(Copies):
    """specdec.3"""

    def propose(self, state):
        drafts = super().propose(state).token_ids
        return Drafts(token_ids=[ids or [1] for ids in drafts])


class Chance(Copies):
    """specdec.4"""

    def continuation(self, known):
        return [random.randrange(128) for _ in range(4)]


class LooksAtNeighbours(Copies):
    """specdec.5"""

    def continuation(self, known):
        return super().continuation([token for copy in self.copies.values() for token in copy])


class ReadsTheEntry(Copies):
    """specdec.5"""

    def unseen(self, state, entry, slot, start):
        return state.tokens_SL[entry, start : int(state.num_tokens_S[slot])].tolist()


class GrowsByOne(Copies):
    """specdec.6"""

    def unseen(self, state, entry, slot, start):
        known = super().unseen(state, entry, slot, 0)
        return known[start:] if start == 0 else known[-1:]


class KeepsItsDrafts(Copies):
    """specdec.6"""

    def propose(self, state):
        drafts = super().propose(state)
        for slot, ids in zip(state.slots, drafts.token_ids, strict=True):
            self.copies[slot] += ids
        return drafts


class CountsUnverifiedTokens(Copies):
    """specdec.3"""

    def unseen(self, state, entry, slot, start):
        return state.tokens_SL[slot, start : int(state.num_tokens_S[slot]) + 1].tolist()


class NeverForgets(Copies):
    """specdec.7"""

    def release(self, slots):
        pass


class ForgetsTheFirst(Copies):
    """specdec.8"""

    def release(self, slots):
        super().release(slots[:1])


class ForgetsOnlyWhatItKnows(Copies):
    """specdec.8"""

    def release(self, slots):
        for slot in slots:
            del self.copies[slot]


class ContextTooShort(Copies):
    """specdec.9"""

    def unseen(self, state, entry, slot, start):
        new = super().unseen(state, entry, slot, start)
        torch.zeros(self.config.max_model_len - 1)[start : start + len(new)].copy_(torch.tensor(new))
        return new


class NeedsTwoTokens(Copies):
    """specdec.9"""

    def continuation(self, known):
        assert known[-self.match] >= 0
        return super().continuation(known)


class WritesIntoTheState(Copies):
    """specdec.10"""

    def propose(self, state):
        drafts = super().propose(state)
        for slot, ids in zip(state.slots, drafts.token_ids, strict=True):
            state.num_tokens_S[slot] += len(ids)
        return drafts


class UndeclaredProbabilities(Copies):
    """specdec.11"""

    def propose(self, state):
        drafts = super().propose(state)
        return Drafts(token_ids=drafts.token_ids, probs=torch.full((len(state.slots), 4, 128), 1 / 128))


class RunsOutOfRows(Copies):
    """specdec.16"""

    rows = 0

    def unseen(self, state, entry, slot, start):
        self.rows += start == 0
        assert self.rows <= self.config.max_num_seqs
        return super().unseen(state, entry, slot, start)


class NotNormalised(Draws):
    """specdec.12"""

    def returned(self, probs):
        return probs * 0.9


class DoublePrecision(Draws):
    """specdec.12"""

    def returned(self, probs):
        return probs.double()


class RowsOfDrafts(Draws):
    """specdec.12"""

    def returned(self, probs):
        return probs[:, 0]


class ProbabilitiesOfAnotherRow(Draws):
    """specdec.12"""

    def returned(self, probs):
        return (probs.flip(0) - 1e-3).clamp(min=0) / (probs.flip(0) - 1e-3).clamp(min=0).sum(-1, keepdim=True)


class ForgetsTheTemperature(Draws):
    """specdec.13"""

    def draw(self, weights_V, temperature, seeds, positions):
        return super().draw(weights_V, 1.0, seeds, positions)


class TakesTheBest(Draws):
    """specdec.13"""

    def draw(self, weights_V, temperature, seeds, positions):
        return [int(weights_V.argmax())] * len(positions)


class CatchesUpTwice(Follows):
    """specdec.14"""

    def propose(self, state):
        self.draft.catch_up(state)
        return super().propose(state)


class ExtendsByOthers(Follows):
    """specdec.14"""

    def extend(self, tokens_R):
        return self.draft.extend((tokens_R + 1) % 128)


class ExtendsTooOften(Follows):
    """specdec.14"""

    def propose(self, state):
        drafts = super().propose(state)
        self.extend(torch.zeros(sum(limit > 0 for limit in state.limit), dtype=torch.int64))
        return drafts


class ExpectsEveryRequest(Follows):
    """specdec.15"""

    def propose(self, state):
        drafts = [ids for ids in super().propose(state).token_ids if ids]
        return Drafts(token_ids=[*drafts, *[[]] * (len(state.slots) - len(drafts))])


MANIFESTS = {Copies: COPIES, Draws: DRAWS, Follows: FOLLOWS}
BROKEN = [decoder for base in MANIFESTS for decoder in base.__subclasses__()]


def suite(decoder: type[SpecDecoder]) -> type[SpecDecoderSuite]:
    """The public form, for a class that no plugin registers."""
    manifest = next(manifest for base, manifest in MANIFESTS.items() if issubclass(decoder, base))
    return type("TestSubject", (SpecDecoderSuite,), {"subject": unregistered(decoder, manifest)})


@pytest.mark.parametrize("decoder", MANIFESTS, ids=lambda decoder: decoder.__name__)
def test_a_sound_decoder_passes(decoder: type) -> None:
    results = run({"TestSubject": suite(decoder)})
    assert {r.test: r.reason for r in results if r.outcome == "failed"} == {}
    skipped = {r.reason for r in results if r.outcome == "skipped"}
    assert skipped <= {"lacks probabilities", "lacks needs_draft_model", "lacks drafts without probabilities"}


@pytest.mark.parametrize("decoder", BROKEN, ids=lambda decoder: decoder.__name__)
def test_a_broken_decoder_is_caught(decoder: type) -> None:
    scenario = (decoder.__doc__ or "").strip()
    results = run({"TestSubject": suite(decoder)}, only=[scenario])
    assert "failed" in {result.outcome for result in results}, results

"""A speculator is held to its contract and its manifest, whenever it proposes."""

import pytest
import torch

from dovetail.config import Selection
from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import PluginRunError
from dovetail.runner.checked_decoder import CheckedDecoder

CONFIG = SpecConfig(num_speculative_tokens=2, max_num_seqs=4, max_model_len=16, vocab_size=10, options={})
PROBS = torch.full((2, 2, 10), 0.1)


class Fixed(SpecDecoder):
    """Proposes what it was made with."""

    def __init__(self, drafts):
        self.drafts = drafts
        self.released = []

    def propose(self, state):
        return self.drafts

    def release(self, slots):
        self.released += slots


def propose(token_ids, probs=None, **claims):
    part = Selection(
        name="echo", target="echo:E", distribution="dist-echo", version="2", why="", plugin="echo", claims=claims
    )
    state = SpecState(
        slots=[0, 3], tokens_SL=torch.zeros(4, 17, dtype=torch.int64), num_tokens_S=torch.ones(4, dtype=torch.int64),
        temperature_S=torch.zeros(4), seeds_S=torch.zeros(4, dtype=torch.int64), limit=[2, 1],
    )  # fmt: skip
    return CheckedDecoder(Fixed(Drafts(token_ids=token_ids, probs=probs)), part, CONFIG).propose(state)


@pytest.mark.parametrize("claims", [{"probabilities": True}, {}])
def test_what_keeps_the_contract_passes(claims):
    assert propose([[1, 9], []], **claims).token_ids == [[1, 9], []]
    assert propose([[1, 9], [0]], PROBS, **claims).probs is PROBS


def test_a_decoder_may_have_probabilities_and_not_give_them():
    assert propose([[1], [2]], probabilities=True).probs is None


@pytest.mark.parametrize(
    ("arguments", "claims", "part"),
    [
        (([[1]],), {}, "drafted for 1 requests where 2 were asked for"),
        (([[1, 2, 3], []],), {}, "drafted 3 tokens where SpecState.limit was 2"),
        (([[1], [2, 3]],), {}, "drafted 2 tokens where SpecState.limit was 1"),
        (([[10], []],), {}, "drafted [10], outside the vocabulary of 10"),
        (([[-1], []],), {}, "drafted [-1], outside the vocabulary of 10"),
        (([[1], []], PROBS), {"probabilities": False}, "returned probabilities, and its manifest says probab"),
        (([[1], []], PROBS[:, :1]), {}, "returned probabilities of shape [2, 1, 10] instead of [2, 2, 10]"),
    ],
)
def test_what_breaks_it_is_refused(arguments, claims, part):
    with pytest.raises(PluginRunError) as caught:
        propose(*arguments, **claims)
    message = str(caught.value)
    assert message.startswith(f"Fixed.propose of plugin 'echo' (dist-echo 2) {part}")
    assert message.endswith("Install a release of dist-echo that repairs this, or leave out --speculative-config.")


def test_releases_are_passed_on():
    decoder = Fixed(Drafts(token_ids=[]))
    CheckedDecoder(decoder, Selection(name="", target="", distribution="", version="", why=""), CONFIG).release([1, 2])
    assert decoder.released == [1, 2]

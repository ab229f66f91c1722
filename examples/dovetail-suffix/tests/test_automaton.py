"""The automaton against a search by brute force."""

import random

from dovetail_suffix.automaton import SuffixAutomaton


def longest_repeated_suffix(tokens):
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[-length:]
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == suffix]
        if ends:
            return length, ends
    return 0, []


def test_it_finds_what_brute_force_finds():
    dice = random.Random(0)
    for letters in (1, 2, 3, 8):
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(120):
            tokens.append(dice.randrange(letters))
            automaton.append(tokens[-1])
            length, ends = longest_repeated_suffix(tokens)
            drafts = automaton.continuation(1, 5)
            assert drafts == automaton.continuation(1, 5)
            assert drafts in [tokens[end : end + 5] for end in ends] if ends else drafts == []
            assert automaton.continuation(length + 1, 5) == []


def test_it_continues_as_the_latest_occurrence_did():
    automaton = SuffixAutomaton()
    for token in (1, 2, 3, 1, 2, 4, 1, 2):
        automaton.append(token)
    assert automaton.continuation(2, 1) == [4]
    assert automaton.continuation(3, 1) == []

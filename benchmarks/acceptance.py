"""How often a model takes the drafts of a smaller one, task by task, and what speculation brings.

DATA is a JSON list of conversations as text, of which each prompt is the part up to the first assistant's turn. Three
tables are printed, a row per task:

1. Greedy agreement: the share of the model's greedy tokens that the draft model would have chosen there too, each given
   the model's own text, with its standard error over prompts; and the tokens per round that follow from it.
2. Greedy speculation in the engine: drafts accepted, tokens per step, and tokens per second relative to the same engine
   without speculation, in the same run.
3. The same at temperature 1, for both ways of sampling drafts.

The first table uses all prompts, the others the first few of each task, one at a time. Times are the least of several
runs.

    python benchmarks/acceptance.py TARGET DRAFT DATA [-k 4] [--prompts 12] [--tokens 96] [--dtype auto]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail import LLM, SamplingParams

ASSISTANT = "<|assistant|>"
LONGEST_PROMPT = 700
KINDS = (
    ("repeat", ("Repeat", "Say this", "Copy this", "Replace ")),
    ("json", ("JSON",)),
    ("tool", ("You can call",)),
    ("story", ("story", "tale", "Continue", "happens next")),
    ("other", ("",)),
)
"""Tasks, and the words that tell one; the first that fits."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One task through one engine."""

    proposed: int
    accepted: int
    tokens: int
    steps: int
    seconds: float

    def against(self, plain: Measured) -> str:
        """Columns of a table: acceptance, tokens per step, speed."""
        share = self.accepted / self.proposed if self.proposed else 0.0
        speed = (self.tokens / self.seconds) / (plain.tokens / plain.seconds)
        return f"{share:8.2f} {self.tokens / self.steps:8.2f} {speed:7.2f}x"


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    common = {"max_num_seqs": 4, "num_threads": arguments.threads, "dtype": arguments.dtype}
    target = LLM(arguments.target, **common)
    tasks = _tasks(json.loads(Path(arguments.data).read_text()), target)
    with LLM(arguments.draft, **common) as small:
        _print_agreement(tasks, target, small, arguments)
    draft = {"method": "draft_model", "model": arguments.draft}
    ways: dict[float, dict[str, dict[str, Any]]] = {
        0.0: {"ngram": {"method": "ngram"}, "draft_model": draft},
        1.0: {"coupled": draft, "rejection": draft | {"sampling": "rejection"}},
    }
    for temperature, sections in ways.items():
        engines = {
            name: LLM(
                arguments.target, speculative_config=section | {"num_speculative_tokens": arguments.k}, **common
            )
            for name, section in sections.items()
        }
        print(f"\ntemperature {temperature:g}: accepted, tokens per step, speed against no speculation")
        print(f"{'':8}" + "".join(f"{name:>26}" for name in engines))
        for kind, prompts in tasks.items():
            params = SamplingParams(temperature=temperature, seed=1, max_tokens=arguments.tokens)
            runs = _measure([target, *engines.values()], prompts[: arguments.prompts], params, arguments.runs)
            print(f"{kind:8}" + "".join(f"{run.against(runs[0]):>26}" for run in runs[1:]), flush=True)
        for engine in engines.values():
            engine.close()
    target.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "draft", "data"):
        parser.add_argument(name)
    for name, default in (("-k", 4), ("--prompts", 12), ("--tokens", 96), ("--runs", 3), ("--threads", None)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


def _tasks(texts: Sequence[str], llm: LLM) -> dict[str, list[list[int]]]:
    """Task -> its prompts as token ids, without those that are too long."""
    found: dict[str, list[list[int]]] = defaultdict(list)
    for text in texts:
        prompt = text[: text.find(ASSISTANT) + len(ASSISTANT)]
        kind = next(name for name, words in KINDS if any(word in prompt for word in words))
        found[kind].append(llm.get_tokenizer().encode(prompt, add_special_tokens=False))
    return {name: [p for p in found[name] if len(p) <= LONGEST_PROMPT] for name, _ in KINDS if found[name]}


def _print_agreement(
    tasks: dict[str, list[list[int]]], target: LLM, draft: LLM, arguments: argparse.Namespace
) -> None:
    print("greedy agreement, given the model's own text")
    print(f"{'task':8}{'prompts':>9}{'tokens':>9}{'agreement':>19}{f'tokens per round (k={arguments.k})':>30}")
    for kind, prompts in tasks.items():
        agreed = [_agreement(prompt, target, draft, arguments.tokens) for prompt in prompts]
        rounds = [length for each in agreed for length in _rounds(each, arguments.k)]
        total = sum(map(len, agreed))
        share = sum(map(sum, agreed)) / total
        # of a ratio of sums, over prompts
        error = sum((sum(each) - share * len(each)) ** 2 for each in agreed) ** 0.5 / total
        agreement = f"{share:.3f} ± {error:.3f}"
        print(f"{kind:8}{len(prompts):9}{total:9}{agreement:>19}{sum(rounds) / len(rounds):30.2f}", flush=True)


def _agreement(prompt: list[int], target: LLM, draft: LLM, tokens: int) -> list[bool]:
    """Whether the draft model's most likely token is the model's, at each token of the model's greedy answer."""
    (answer,) = target.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    generated = answer.outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (scored,) = draft.generate([*prompt, *generated], params, use_tqdm=False)
    assert scored.prompt_logprobs is not None
    own = scored.prompt_logprobs[len(prompt) :]
    return [entry is not None and entry[token].rank == 1 for entry, token in zip(own, generated, strict=True)]


def _rounds(agreed: Sequence[bool], k: int) -> list[int]:
    """Tokens of each round, if ``k`` are drafted at a time and one more comes from the model."""
    lengths, at = [], 0
    while at < len(agreed):
        accepted = next((i for i, same in enumerate(agreed[at : at + k]) if not same), min(k, len(agreed) - at))
        lengths.append(accepted + 1)
        at += accepted + 1
    return lengths


def _measure(engines: Sequence[LLM], prompts: list[list[int]], params: SamplingParams, runs: int) -> list[Measured]:
    """Each engine over all prompts, in turns, so that what else the machine does meets all of them."""
    best: list[Measured | None] = [None] * len(engines)
    for _ in range(runs):
        for i, engine in enumerate(engines):
            measured, kept = _run(engine, prompts, params), best[i]
            if kept is None or measured.seconds < kept.seconds:
                best[i] = measured
    return [measured for measured in best if measured is not None]


def _run(engine: LLM, prompts: list[list[int]], params: SamplingParams) -> Measured:
    before, start = engine.stats(), time.perf_counter()
    for prompt in prompts:
        engine.generate(prompt, params, use_tqdm=False)
    seconds, after = time.perf_counter() - start, engine.stats()
    return Measured(
        proposed=after.drafts_proposed - before.drafts_proposed,
        accepted=after.drafts_accepted - before.drafts_accepted,
        tokens=after.generation_tokens - before.generation_tokens,
        steps=after.steps - before.steps,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()

"""Perplexity of a checkpoint on a text in several number formats, and its ratio to plain weights, in one run.

The text is split where a line holds the character U+001E alone. Each story is scored from its second token on, in
windows of the context that overlap by half: every token is scored once, with at least half a window before it where
the story has that much.

    python benchmarks/perplexity.py MODEL TEXT --quantization int8 fp8 [--tokens 20000] [--window 1024]
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

from dovetail import LLM, SamplingParams

SEPARATOR = "\n\x1e\n"
PLAIN = "none"
LAST = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)


def windows(tokens: list[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Parts of a story, and how many tokens at the beginning of each are context only."""
    yield tokens[:size], 1
    for start in range(size // 2, len(tokens) - size // 2, size // 2):
        yield tokens[start : start + size], size - size // 2


def stories(llm: LLM, text: str, limit: int | None) -> list[list[int]]:
    """Token ids of each story, up to ``limit`` tokens in all."""
    encoded, left = [], limit if limit is not None else len(text)
    for story in text.split(SEPARATOR):
        tokens = llm.get_tokenizer().encode(story)[:left]
        left -= len(tokens)
        encoded += [tokens] if len(tokens) > 1 else []
    return encoded


def score(model: str, text: str, method: str, arguments: argparse.Namespace) -> tuple[float, int]:
    """Sum of the negative log-likelihoods in nats, and the number of scored tokens."""
    quantization, size = None if method == PLAIN else method, arguments.window
    with LLM(model, dtype=arguments.dtype, quantization=quantization, max_model_len=size + 1, max_num_seqs=4) as llm:
        parts = [part for story in stories(llm, text, arguments.tokens) for part in windows(story, size)]
        outputs = llm.generate([tokens for tokens, _ in parts], LAST)
    loss, count = 0.0, 0
    for output, (tokens, context) in zip(outputs, parts, strict=True):
        assert output.prompt_logprobs is not None
        for token, entry in zip(tokens[context:], output.prompt_logprobs[context:], strict=True):
            assert entry is not None
            loss -= entry[token].logprob
            count += 1
    return loss, count


def main() -> None:
    """Score every format, plain weights first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--quantization", nargs="*", default=[])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, help="score only this many at the beginning of the text")
    parser.add_argument("--window", type=int, default=1024)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    text, plain = arguments.text.read_text(encoding="utf-8"), 0.0
    for method in (PLAIN, *arguments.quantization):
        start = time.perf_counter()
        loss, count = score(arguments.model, text, method, arguments)
        perplexity = math.exp(loss / count)
        plain = plain or perplexity
        seconds = time.perf_counter() - start
        print(
            f"{method:<12} perplexity {perplexity:9.4f} on {count} tokens, {perplexity / plain - 1:+8.3%} of "
            f"{arguments.dtype} plain, {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

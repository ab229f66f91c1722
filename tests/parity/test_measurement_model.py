"""Larger trained models, if ``DOVETAIL_TEST_MODELS`` names the folder that holds them: 64 prompts × 128 tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dovetail.testing.engines import engine_request, run_until_idle

MODELS = Path(os.environ.get("DOVETAIL_TEST_MODELS", "/nonexistent"))
NAMES = ("fable-30m", "fable-moe")
pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((MODELS / name).is_dir() for name in NAMES),
        reason=f"DOVETAIL_TEST_MODELS names no folder with {' and '.join(NAMES)}",
    ),
    pytest.mark.timeout(1800),
]
COUNT = 128


def prompts(path: Path) -> list[list[int]]:
    """64 prompts of 20 to 200 tokens from the shipped tokenizer; every fourth begins alike."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    opening = "Once upon a time there lived in a small cottage near the great forest a woodcutter and his three sons. "
    names = ("king", "fox", "queen", "miller", "bear", "princess", "giant", "tailor")
    texts = []
    for i in range(64):
        tale = f"The {names[i % 8]} number {i} said to the {names[(i * 3 + 1) % 8]}: come with me to the river. "
        texts.append((opening if i % 4 == 0 else "") + tale * (1 + i % 7))
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers_token_for_token(make_engine, name: str) -> None:
    from transformers import AutoModelForCausalLM

    path = MODELS / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    batch = prompts(path)
    engine = make_engine(path, max_model_len=512, max_num_seqs=64, max_num_batched_tokens=256)
    for i, prompt in enumerate(batch):
        engine.add(engine_request(prompt, request_id=str(i), max_tokens=COUNT, ignore_eos=True))
    completions = run_until_idle(engine)
    assert engine.stats().prefix_hits > 0
    different = []
    for i, prompt in enumerate(batch):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, pad_token_id=0
            )
        if completions[str(i)].token_ids != tokens[0, len(prompt) :].tolist():
            different.append(i)
    assert not different

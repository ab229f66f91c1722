"""The demo model through the whole engine: greedy tokens equal transformers', and no optimisation changes them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from dovetail.engine.engine import Engine
from dovetail.errors import PluginError
from dovetail.testing.engines import engine_request, run_until_idle

COUNT = 20


def prompts_for(vocab: int = 8192) -> list[list[int]]:
    """Ragged prompts; half of them share a prefix of several pages."""
    rng = random.Random(7)
    shared = [1, *(rng.randrange(16, vocab) for _ in range(40))]
    lengths = (1, 5, 17, 33, 64, 90)
    alone = [[1, *(rng.randrange(16, vocab) for _ in range(n))] for n in lengths]
    return alone + [shared + [rng.randrange(16, vocab) for _ in range(n)] for n in lengths]


PROMPTS = prompts_for()


@pytest.fixture(scope="module")
def expected(demo_reference) -> list[list[int]]:
    return [demo_reference.greedy(prompt, COUNT) for prompt in PROMPTS]


def greedy(engine: Engine, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        engine.add(engine_request(prompt, request_id=str(i), max_tokens=COUNT, ignore_eos=True))
    completions = run_until_idle(engine)
    return [completions[str(i)].token_ids for i in range(len(prompts))]


SMALL = {"max_model_len": 160, "max_num_seqs": 12, "max_num_batched_tokens": 160}
PAGE = 4 * 2 * 16 * 2 * 64 * 4  # layers × (K, V) × tokens × heads × size × bytes
SETTINGS = {
    "plain": {"enable_prefix_caching": False, "max_num_batched_tokens": 768},
    "chunked": {"max_num_batched_tokens": 16},
    "prefix_cache": {"max_num_batched_tokens": 64},
    "whole_prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 160},
    "one_at_a_time": {"max_num_seqs": 1},
    "preemption": {"kv_cache_memory": 26 * PAGE / 2**30, "enable_prefix_caching": False},
    "preemption_prefix_cache": {"kv_cache_memory": 26 * PAGE / 2**30, "max_num_batched_tokens": 32},
    "large_pages": {"block_size": 32},
}


CASES = [("cpu", setting) for setting in SETTINGS] + [
    ("reference", "prefix_cache"),
    ("ladder", "chunked"),
    ("ladder", "preemption_prefix_cache"),
    ("whole", "preemption_prefix_cache"),
]


@pytest.mark.parametrize(("platform", "setting"), CASES)
def test_greedy_equals_transformers(make_engine, demo_model: Path, expected, platform: str, setting: str) -> None:
    engine = make_engine(demo_model, platform, **{**SMALL, **SETTINGS[setting]})
    assert greedy(engine) == expected
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == setting.startswith("preemption")
    if setting == "prefix_cache":
        assert greedy(engine) == expected, "a second time, from the cache"
        assert engine.stats().prefix_hits > stats.prefix_hits


@pytest.mark.parametrize("platform", ["cpu", "ladder", "whole"])
def test_drafts_never_change_greedy_tokens(make_engine, demo_model: Path, expected, monkeypatch, platform: str) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import scripted_decoder

    scripts = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    monkeypatch.setattr(scripted_decoder, "SCRIPTS", scripts)
    engine = make_engine(
        demo_model, platform, **SMALL, spec_decoder="scripted_decoder:ScriptedDecoder", num_speculative_tokens=4
    )
    assert greedy(engine) == expected
    stats = engine.stats()
    assert 0 < stats.drafts_accepted < stats.drafts_proposed
    assert stats.steps < COUNT, "accepted drafts save steps"
    sys.modules.pop("scripted_decoder")


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ("CarelessDecoder", r"CarelessDecoder.propose of plugin .* drafted \[8192\], outside the vocabulary of 8192"),
        ("EagerDecoder", r"EagerDecoder.propose of plugin .* drafted 3 tokens where SpecState.limit was 2"),
    ],
)
def test_drafts_that_break_the_contract_name_the_decoder(
    make_engine, demo_model: Path, monkeypatch, decoder: str, message: str
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    spec = f"scripted_decoder:{decoder}"
    engine = make_engine(demo_model, **SMALL, spec_decoder=spec, num_speculative_tokens=2)
    engine.add(engine_request(PROMPTS[0], max_tokens=8))
    with pytest.raises(PluginError, match=message):
        run_until_idle(engine)


@pytest.mark.parametrize("platform", ["cpu", "whole"])
def test_prompt_logprobs_equal_transformers(make_engine, demo_model: Path, demo_reference, platform: str) -> None:
    prompt = PROMPTS[5]
    engine = make_engine(demo_model, platform, **{**SMALL, "max_num_batched_tokens": 32})
    engine.add(engine_request(prompt, request_id="x", max_tokens=2, prompt_logprobs=3, logprobs=3))
    completion = run_until_idle(engine)["x"]
    reference = demo_reference.logprobs(prompt + completion.token_ids)
    assert completion.prompt_logprobs is not None
    assert completion.prompt_logprobs[0] is None
    entries = [*completion.prompt_logprobs[1:], *completion.logprobs]
    for position, entry in enumerate(entries):
        assert entry is not None
        row = reference[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert entry.top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_seeded_requests_do_not_depend_on_the_batch(make_engine, demo_model: Path) -> None:
    def sampled(prompts: list[list[int]], **options) -> list[list[int]]:
        engine = make_engine(demo_model, **{**SMALL, **options})
        for i, prompt in enumerate(prompts):
            chance = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
            engine.add(engine_request(prompt, request_id=str(i), max_tokens=COUNT, ignore_eos=True, **chance))
        completions = run_until_idle(engine)
        return [completions[str(i)].token_ids for i in range(len(prompts))]

    together = sampled(PROMPTS)
    assert together[::4] == [sampled([prompt])[0] for prompt in PROMPTS[::4]]
    assert together == sampled(PROMPTS, kv_cache_memory=26 * PAGE / 2**30, enable_prefix_caching=False)

"""Greedy tokens of trained models on a GPU, beside those of the CPU platform.

The demo model is always there; ``DOVETAIL_TEST_MODELS`` may name a folder with larger ones.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM, SamplingParams
from dovetail.plugins.requirements import explain_unmet
from dovetail_cuda.graphs import GraphPool
from dovetail_cuda.platform import CudaPlatform
from dovetail_cuda.plugin import CUDNN

MODELS = Path(os.environ.get("DOVETAIL_TEST_MODELS", "/nonexistent"))
LARGER = [path for name in ("fable-30m", "fable-moe") if (path := MODELS / name).is_dir()]
CHECKPOINTS = [Path(str(files("dovetail_models"))) / "checkpoints/fable-4m", *LARGER]
COUNT = 96
MARGIN = 0.1
"""Nats by which the most likely token leads in float32. In bfloat16, whose logits are rounded to sixteenths, two orders
of summation may swap tokens that are closer.
"""
needs_cudnn = pytest.mark.skipif(bool(explain_unmet(CUDNN)), reason="lacks nvidia-cudnn-frontend")
pytestmark = [
    pytest.mark.skipif(not CudaPlatform.probe().available, reason="lacks a GPU"),
    pytest.mark.timeout(600),
]


def prompts() -> list[str]:
    """Ragged; every fourth begins alike, for longer than a page."""
    opening = "Once upon a time there lived in a small cottage near the great forest a woodcutter and his three sons. "
    names = ("king", "fox", "queen", "miller", "bear", "princess", "giant", "tailor")
    tale = "The {} number {} said to the {}: come with me to the river. "
    return [
        (opening if i % 4 == 0 else "") + tale.format(names[i % 8], i, names[(i * 3 + 1) % 8]) * (1 + i % 5)
        for i in range(24)
    ]


def generate(model: Path, platform: str, dtype: str, **options: Any) -> list[list[tuple[int, float]]]:
    """Per prompt its tokens, each with the lead of the most likely token there."""
    params = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
    limits = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    with LLM(str(model), platform=platform, dtype=dtype, **limits, **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts(), params, use_tqdm=False)]
    steps = []
    for output in outputs:
        assert output.logprobs is not None
        leads = [sorted((entry.logprob for entry in top.values()), reverse=True) for top in output.logprobs]
        steps.append([(token, lead[0] - lead[1]) for token, lead in zip(output.token_ids, leads, strict=True)])
    return steps


@pytest.mark.parametrize("model", CHECKPOINTS, ids=lambda path: path.name)
@pytest.mark.parametrize("options", [{}, {"eager": True}, {"async_scheduling": False}], ids=str)
def test_float32_gives_the_tokens_of_the_cpu(model: Path, options: dict[str, Any]) -> None:
    wanted = generate(model, "cpu", "float32")
    got = generate(model, "cuda", "float32", **options)
    different = [i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if [t for t, _ in a] != [t for t, _ in b]]
    assert not different


@pytest.mark.parametrize("model", CHECKPOINTS, ids=lambda path: path.name)
@pytest.mark.parametrize("attention", ["triton", pytest.param("cudnn", marks=needs_cudnn)])
def test_bfloat16_gives_the_tokens_of_float32_on_the_cpu_where_one_leads_clearly(attention: str, model: Path) -> None:
    compared, unclear = 0, []
    got = generate(model, "cuda", "bfloat16", attention=attention)
    for mine, theirs in zip(got, generate(model, "cpu", "float32"), strict=True):
        for (token, _), (right, lead) in zip(mine, theirs, strict=True):
            if token != right:
                unclear.append(lead)  # from here on the texts differ
                break
            compared += 1
    assert max(unclear, default=0.0) < MARGIN
    assert compared > 24 * COUNT / 2


EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("quantization", ["int8", "fp8", "int8-w8a8", "fp8-w8a8"])
def test_quantized_experts_in_graphs_give_the_tokens_of_plain_steps(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))
    captured: list[int] = []
    capture = GraphPool.capture
    monkeypatch.setattr(GraphPool, "capture", lambda pool, run: (captured.append(1), capture(pool, run))[1])
    options = {"load_format": "dummy", "tokenizer": str(CHECKPOINTS[0]), "quantization": quantization}
    prompts = [{"prompt_token_ids": [(31 * i + 7 * j) % 4000 for j in range(3 + 5 * i)]} for i in range(16)]
    params = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    outputs = []
    for eager in (True, False):
        with LLM(str(tmp_path), platform="cuda", dtype="bfloat16", max_num_seqs=16, eager=eager, **options) as llm:
            done = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        outputs.append([[output.outputs[0].token_ids for output in each] for each in done])
        assert bool(captured) != eager
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0][0]}) == len(prompts)
    assert not caplog.records  # no size runs without a graph

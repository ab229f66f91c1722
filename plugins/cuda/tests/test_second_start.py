"""What a start compiles: everything at the first, nothing at the second, and nothing while requests are served."""

import json
import os
import subprocess
import sys

import pytest

from dovetail_cuda.platform import CudaPlatform

ENGINE = """
import json, sys
import triton

compiled = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: cache_hit or compiled.append(src.name)
from dovetail import LLM, SamplingParams

llm = LLM(platform="cuda", dtype="bfloat16", max_num_seqs=24, max_num_batched_tokens=256, max_model_len=256)
started = list(compiled)
ways = [
    {"temperature": 0.0},
    {},
    {"top_p": 0.9, "top_k": 20, "logprobs": 2},
    {"presence_penalty": 0.5, "logit_bias": {5: 1.0}},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logprobs": 0},
]
for count in (1, 2, 3, 16, 23):
    for params in ways:
        prompts = [{"prompt_token_ids": list(range(5, 5 + 7 * i + count))} for i in range(count)]
        llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True, **params), use_tqdm=False)
json.dump({"start": started, "serving": compiled[len(started):]}, sys.stdout)
"""


@pytest.mark.skipif(not CudaPlatform.probe().available, reason="lacks a GPU")
def test_a_second_start_compiles_nothing(tmp_path):
    def start():
        environment = {**os.environ, "DOVETAIL_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", ENGINE], capture_output=True, env=environment, check=True)
        return json.loads(done.stdout)

    first = start()
    assert first["start"]
    assert first["serving"] == []
    assert len(list(tmp_path.rglob("*.cubin"))) > 10  # by other processes, too
    assert start() == {"start": [], "serving": []}

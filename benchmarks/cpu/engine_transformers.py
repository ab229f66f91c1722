"""transformers' worker: continuous batching (``generate_batch``)."""

import os
import sys

from worker import Generate, Stream, serve


def load() -> tuple[str, Generate, Stream]:
    model, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads))
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    lm.generation_config.eos_token_id = None
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=2048, allow_block_sharing=True)

    def run(prompts: list[list[int]], out: int, timestamps: bool) -> list:
        config = GenerationConfig(max_new_tokens=out, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True)
        results = lm.generate_batch(
            prompts,
            generation_config=config,
            record_timestamps=timestamps,
            warmup=False,
            persistent_manager=True,
            continuous_batching_config=batching,
        )
        return sorted(results.values(), key=lambda r: int(r.request_id.split("_")[-1]))

    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        return [list(r.generated_tokens) for r in run(prompts, out, timestamps=False)]

    def stream(prompt: list[int], out: int) -> list[float]:
        return list(run([prompt], out, timestamps=True)[0].timestamps)  # transformers reads perf_counter too

    return transformers.__version__, generate, stream


serve(load)

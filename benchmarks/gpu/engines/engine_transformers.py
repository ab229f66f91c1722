"""transformers' worker: continuous batching (``generate_batch``), with the attention that it finds installed."""

from typing import Any

from worker import Engine, Prompts, main

LARGEST = 1e-3


def load(model: str, options: dict[str, Any]) -> Engine:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    with torch.device("cuda"):
        config = AutoConfig.from_pretrained(model)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.uniform_(-LARGEST, LARGEST)
    sizes = {"max_memory_percent": 0.8, "max_requests_per_batch": 512, "max_blocks_per_request": 16}
    batching = ContinuousBatchingConfig(**{**sizes, **options})

    def generate(prompts: Prompts, out: int) -> int:
        params = GenerationConfig(max_new_tokens=out, do_sample=False, eos_token_id=-1, pad_token_id=0)
        results = lm.generate_batch(
            prompts, generation_config=params, continuous_batching_config=batching, persistent_manager=True
        )
        return sum(len(result.generated_tokens) for result in results.values())

    return Engine(transformers.__version__, generate, reset=lambda: None)  # no prompt comes twice


if __name__ == "__main__":
    main(load)

"""vLLM's worker: its defaults, with weights and prompts as ours."""

from typing import Any

from worker import Engine, Prompts, main


def load(model: str, options: dict[str, Any]) -> Engine:
    import vllm

    llm = vllm.LLM(
        model=model,
        load_format="dummy",  # uniform within ±1e-3
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype="bfloat16",
        max_model_len=4096,
        gpu_memory_utilization=0.9,
        **options,
    )

    def generate(prompts: Prompts, out: int) -> int:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return Engine(vllm.__version__, generate, llm.reset_prefix_cache)


if __name__ == "__main__":
    main(load)

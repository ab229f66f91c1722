"""Dovetail's worker."""

from importlib.metadata import version
from importlib.resources import files
from typing import Any

from worker import Engine, Prompts, main


def load(model: str, options: dict[str, Any]) -> Engine:
    from dovetail import LLM, SamplingParams

    defaults = {
        "load_format": "dummy",
        "tokenizer": str(files("dovetail_models") / "checkpoints/fable-4m"),  # any will do: ids go in and come out
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 512,
        "max_num_batched_tokens": 16384,  # what vLLM chooses for such a device
    }
    llm = LLM(model, **{**defaults, **options})

    def generate(prompts: Prompts, out: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return Engine(version("dovetail-core"), generate, reset=lambda: None)  # no prompt comes twice


if __name__ == "__main__":
    main(load)

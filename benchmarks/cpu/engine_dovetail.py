"""Dovetail's worker: the offline API."""

import sys
import time

from worker import Generate, Stream, serve


def load() -> tuple[str, Generate, Stream]:
    model, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import dovetail
    from dovetail import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=1024, max_num_seqs=32, num_threads=threads)

    def params(out: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)

    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params(out), use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def stream(prompt: list[int], out: int) -> list[float]:
        return [time.perf_counter() for _ in llm.stream({"prompt_token_ids": prompt}, params(out))]

    return dovetail.__version__, generate, stream


serve(load)

"""llama.cpp's worker, for single streams; needs ``MODEL/model-bf16.gguf`` (see the README)."""

import sys
import time
from pathlib import Path

from worker import Generate, Stream, serve


def load() -> tuple[str, Generate, Stream]:
    model, _, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import llama_cpp

    llm = llama_cpp.Llama(
        str(Path(model) / "model-bf16.gguf"),
        n_ctx=1024,
        n_batch=2048,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def stream(prompt: list[int], out: int) -> list[float]:
        times: list[float] = []
        for _ in llm.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter())
            if len(times) == out:
                break
        return times

    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        raise ValueError("this worker measures single streams only")

    return llama_cpp.__version__, generate, stream


serve(load)

"""vLLM's worker: its CPU build, compiled mode, set up as its documentation asks (tcmalloc and its OpenMP preloaded)."""

import os
import sys
import time
from pathlib import Path

from worker import Generate, Stream, serve

PRELOAD = [
    *map(str, Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")),
    *map(str, Path(sys.prefix).glob("lib/libiomp5.so")),
]


def load() -> tuple[str, Generate, Stream]:
    model, dtype = sys.argv[1], sys.argv[2]
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype=dtype, max_model_len=1024, max_num_seqs=32, disable_log_stats=True)

    def params(out: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=out, min_tokens=out, ignore_eos=True, detokenize=False)

    def generate(prompts: list[list[int]], out: int) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params(out), use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def stream(prompt: list[int], out: int) -> list[float]:
        engine, times = llm.llm_engine, []
        engine.add_request(str(time.perf_counter_ns()), {"prompt_token_ids": prompt}, params(out))
        while engine.has_unfinished_requests():
            times += [time.perf_counter() for _ in engine.step()]
        return times

    return vllm.__version__, generate, stream


def main() -> None:
    threads = int(sys.argv[3])
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        OMP_NUM_THREADS=str(threads),
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
    )
    if PRELOAD and PRELOAD[0] not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = ":".join(PRELOAD)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    serve(load)


if __name__ == "__main__":
    main()

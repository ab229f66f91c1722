"""``python -m dovetail_tpu.table FILE.md``: compiles steps for every generation, and writes what they take."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dovetail.config import EngineConfig
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail_tpu import hlo
from dovetail_tpu.aot import AotProgram
from dovetail_tpu.kernels.chip import CHIPS
from dovetail_tpu.slices import COUNTED, SLICES
from dovetail_tpu.trial import Trial

MIB = 1 << 20
DEMO, LAYER = "fable-4m", "one layer of Llama-3.1-8B"
LAYER_OF_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEVICES = (1, 4)
STEPS = MappingProxyType({"decode": 32, "mixed": 512})
"""Tokens of each step; there are 32 requests."""
LIMITS: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 32, "max_num_batched_tokens": 512, "block_size": 32}
BLOCKS = 8192
"""So large that no compiler takes a cache for something to bring near."""
MOST_PROCESSES = 4
"""Each takes about 2 GB."""
HEAD = ("chip", "devices", "model", "step", "arguments", "KV in place", "temporary", "code", "of", "collectives")
NOTICE = "<!-- Written by `make tpu-table` from what libtpu says. Do not edit. -->\n"


class Case(NamedTuple):
    """Steps of one model on one mesh."""

    chip: str
    devices: int
    model: str


CASES = tuple(Case(*case) for case in product(CHIPS, DEVICES, (DEMO, LAYER)))


def configuration(model: str, **options: Any) -> EngineConfig:
    """Of an engine that runs one of the table's models on the platform ``tpu``."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        named: dict[str, Any] = {}
        if model == LAYER:
            named["model"] = folder
            (Path(folder) / "config.json").write_text(json.dumps(LAYER_OF_8B), encoding="utf-8")
        asked = EngineOptions(platform="tpu", dtype="bfloat16", load_format="dummy", **named, **LIMITS, **options)
        return resolve(asked, PluginHost().discover().registries)


def compiled(case: Case, steps: Sequence[str] = (*STEPS,), *, ruled: bool = False) -> list[AotProgram]:
    """The programs of one case, one per step."""
    target = SLICES[f"{case.chip}-{4 * COUNTED[case.chip]}"]
    trial = Trial(configuration(case.model), target, case.devices)
    return trial.compile([(STEPS[step], LIMITS["max_num_seqs"]) for step in steps], BLOCKS, ruled=ruled)


def rows(case: Case, programs: Sequence[AotProgram]) -> Iterator[tuple[str, ...]]:
    """Of the table: one per step of a case."""
    for step, program in zip(STEPS, programs, strict=True):
        memory = program.memory
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(hlo.collectives(program.text).items()))
        sizes = (memory.arguments, memory.alias, memory.temp, memory.code, CHIPS[case.chip].hbm_bytes)
        yield (case.chip, str(case.devices), case.model, step, *(f"{n / MIB:.1f}" for n in sizes), counts)


def text_of(table: Sequence[Sequence[str]], libtpu: str) -> str:
    """The page around it."""
    steps = " and ".join(f"{name} ({tokens} tokens)" for name, tokens in STEPS.items())
    page = LIMITS["block_size"]
    intro = f"""# Programs for TPUs, as their compiler sees them

Steps of 32 requests, {steps}, on one and on four devices of every generation, compiled on a
CPU host by libtpu {libtpu}. **They were compiled, and never executed on a chip.** Weights and activations are bfloat16;
the KV cache has {BLOCKS} blocks of {page} tokens. Sizes are MiB of one device's memory: arguments are weights, cache
and inputs, of which the cache is changed in place; *of* is what the compiler lets programs use. A v4 or tpu7x chip is
two devices. `make test-tpu-aot` checks that nothing copies the cache and that it all fits.
"""
    lines = [HEAD, ["---"] * len(HEAD), *table]
    return "\n".join([NOTICE, intro, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def main() -> None:
    """Write the page. Compilers of several processes work at a time."""
    with ProcessPoolExecutor(min(MOST_PROCESSES, os.cpu_count() or 1), get_context("spawn")) as processes:
        found = processes.map(compiled, CASES)
        table = [row for case, programs in zip(CASES, found, strict=True) for row in rows(case, programs)]
    Path(sys.argv[1]).write_text(text_of(table, version("libtpu")), encoding="utf-8")


if __name__ == "__main__":
    main()

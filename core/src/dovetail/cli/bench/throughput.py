"""``dovetail bench throughput``."""

from __future__ import annotations

import time

import click

from dovetail.cli import log
from dovetail.cli.bench import report, workload
from dovetail.cli.options import as_arguments, engine_command, json_option
from dovetail.cli.section_options import EngineCommand
from dovetail.options import EngineOptions


@click.command(cls=EngineCommand)
@engine_command
@click.option(
    "--num-prompts", type=click.IntRange(1), default=64, show_default=True, help="Requests, sent at once."
)
@workload.workload_options
@json_option
def throughput(
    engine: EngineOptions,
    num_prompts: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    log_level: str,
    as_json: bool,
) -> None:
    """Run many requests at once, without a server, and report requests and tokens per second."""
    log.set_up(log_level)
    from dovetail import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    prompts = workload.random_prompts(num_prompts, input_len, vocab_size, engine.seed)
    with LLM(**as_arguments(engine)) as llm:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - started
    generated = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    numbers = {
        "requests": num_prompts,
        "input_tokens": num_prompts * input_len,
        "output_tokens": generated,
        "seconds": seconds,
        "requests_per_second": num_prompts / seconds,
        "output_tokens_per_second": generated / seconds,
        "total_tokens_per_second": (num_prompts * input_len + generated) / seconds,
    }
    report.show("throughput", numbers, as_json)

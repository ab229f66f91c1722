"""``dovetail bench latency``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from dovetail.cli import log
from dovetail.cli.bench import report, workload
from dovetail.cli.options import as_arguments, engine_command, json_option
from dovetail.cli.section_options import EngineCommand
from dovetail.options import EngineOptions

if TYPE_CHECKING:
    from dovetail import LLM, SamplingParams


@click.command(cls=EngineCommand)
@engine_command
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Requests measured, one by one."
)
@workload.workload_options
@json_option
def latency(
    engine: EngineOptions,
    runs: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    log_level: str,
    as_json: bool,
) -> None:
    """Run one request at a time, without a server: time to first token, and per later token.

    One more request runs first and is not counted.
    """
    log.set_up(log_level)
    from dovetail import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    prompts = workload.random_prompts(runs + 1, input_len, vocab_size, engine.seed)
    with LLM(**as_arguments(engine)) as llm:
        measured = [_measure(llm, prompt, params) for prompt in prompts][1:]
    numbers: dict[str, float | int | str] = {
        "runs": runs,
        "input_tokens": input_len,
        "output_tokens": output_len,
        **report.spread("ttft", [first for first, _ in measured]),
        **report.spread("e2e", [total for _, total in measured]),
    }
    if output_len > 1:
        numbers |= report.spread("tpot", [(total - first) / (output_len - 1) for first, total in measured])
    report.show("latency", numbers, as_json)


def _measure(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[float, float]:
    """Seconds to the first token, and to the last."""
    started = time.perf_counter()
    first = 0.0
    for output in llm.stream(prompt, params):
        if not first and output.outputs[0].token_ids:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started

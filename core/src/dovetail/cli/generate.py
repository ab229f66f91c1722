"""``dovetail generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dovetail.cli import log, sampling
from dovetail.cli.options import as_arguments, engine_command, json_option
from dovetail.cli.section_options import EngineCommand
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions
from dovetail.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dovetail import LLM, RequestOutput


@click.command(cls=EngineCommand)
@engine_command
@click.option(
    "-p", "--prompt", "prompts", multiple=True, help="Text to continue; may be given several times."
)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with one prompt per line.",
)
@click.option("--n", type=int, default=1, show_default=True, help="Completions per prompt.")
@sampling.sampling_options
@json_option
def generate(
    engine: EngineOptions,
    prompts: tuple[str, ...],
    file: Path | None,
    n: int,
    log_level: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Complete prompts without a server: from --prompt, --file, or standard input.

    A single prompt is printed as it is generated.
    """
    log.set_up(log_level)
    texts = _prompts(prompts, file)
    sampling.check(values | {"n": n})
    from dovetail import LLM

    with LLM(**as_arguments(engine)) as llm:
        recommended = msgspec.structs.asdict(llm.get_default_sampling_params())
        params = SamplingParams(**recommended | sampling.given(values) | {"n": n})
        if len(texts) == 1 and n == 1 and not as_json:
            _stream(llm, texts[0], params)
            return
        outputs = llm.generate(texts, params)
    if as_json:
        click.echo(json.dumps([_to_json(output) for output in outputs], ensure_ascii=False, indent=2))
        return
    for output in outputs:
        for completion in output.outputs:
            click.secho(output.prompt, bold=True, nl=False)
            click.echo(completion.text)


def _prompts(given: tuple[str, ...], file: Path | None) -> list[str]:
    texts = list(given)
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {file} cannot be read as text: {error}.") from error
        texts += [line for line in content.splitlines() if line.strip()]
    if not texts and not sys.stdin.isatty():
        texts = [sys.stdin.read().rstrip("\n")]
    if not any(texts):
        raise ConfigError("There is no prompt; give one with --prompt, --file, or on standard input.")
    return texts


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> None:
    outputs = llm.stream(prompt, params)  # refuses what cannot run, before anything is printed
    click.secho(prompt, bold=True, nl=False)
    printed = 0
    for output in outputs:
        text = output.outputs[0].text
        click.echo(text[printed:], nl=False)
        printed = len(text)
    click.echo()


def _to_json(output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "outputs": [
            {"text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            for c in output.outputs
        ],
    }

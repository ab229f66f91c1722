"""What the operator sees while the server starts: progress bars on a terminal, lines in a log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from dovetail.contracts.executor import Progress
from dovetail.engine.process import Ready
from dovetail.server.service import ServedModel

_logger = logging.getLogger("dovetail.server")
_TITLES = {"load": "Loading weights", "warm-up": "Warming up"}


class StartupProgress(Progress):
    """One bar per stage, or one line per finished stage where there is no terminal."""

    def __init__(self, bars: Bars | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    @classmethod
    @contextmanager
    def shown(cls, console: Console) -> Iterator[StartupProgress]:
        """Show progress on ``console`` while the context lasts."""
        if not console.is_terminal:
            yield cls(None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, console=console) as bars:
            yield cls(bars)

    def update(self, stage: str, done: int, total: int) -> None:
        """Draw or log."""
        title = _TITLES.get(stage, stage)
        if self._bars is None:
            if done == total:
                _logger.info("%s: done.", title)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(title, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)


def print_configuration(console: Console, model: ServedModel, ready: Ready, url: str) -> None:
    """What runs, why, and where."""
    rows = _configuration(model, ready)
    width = max(map(len, rows))
    for title, text in rows.items():
        console.print(f"{title:{width}}  {text}", highlight=False, markup=False, soft_wrap=True)
    serving = f"Serving [bold]{escape(model.name)}[/bold] at [bold]{url}[/bold]"
    console.print(serving, highlight=False, soft_wrap=True)


def _configuration(model: ServedModel, ready: Ready) -> dict[str, str]:
    config, info = model.config, model.info
    parts = {
        "model": config.model,
        "platform": config.platform,
        "attention": config.attention,
        "quantization": config.quant,
        "speculation": config.spec_decoder,
    }
    rows = {
        title: f"{part.name} ({part.distribution} {part.version}; {part.why})"
        for title, part in parts.items()
        if part is not None
    }
    tokens = (info.num_blocks - 1) * info.block_size
    prefix = "on" if config.enable_prefix_caching else "off"
    defaults = ", ".join(f"{name} {value}" for name, value in model.defaults.items())
    rows["dtype"] = f"{config.dtype}, KV cache {config.kv_dtype}"
    rows["KV cache"] = f"{tokens} tokens in blocks of {info.block_size}; prefix cache {prefix}"
    rows["limits"] = (
        f"{config.max_model_len} tokens per request, {config.max_num_seqs} requests and "
        f"{config.max_num_batched_tokens} tokens per step"
    )
    rows["sampling"] = f"{defaults} (generation_config.json)" if defaults else "temperature 1.0"
    rows["start-up"] = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in ready.seconds.items())
    return rows

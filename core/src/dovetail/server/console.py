"""What the operator reads once the server has started."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from dovetail.engine.process import Ready
from dovetail.server.service import ServedModel


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

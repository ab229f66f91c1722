"""How long a context is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import PlatformManifest
from dovetail.plugins.registry import Entry

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts


def decide(
    options: EngineOptions, platform: Entry[PlatformManifest] | None, facts: ModelFacts | None
) -> tuple[int | None, list[str]]:
    """The longest prompt plus output in tokens, and obstacles. The default is the checkpoint's own length."""
    length = options.max_model_len
    if length is None and facts is not None:
        length = facts.max_positions
    if length is None:
        return None, []
    obstacles = []
    if facts is not None and length > facts.max_positions:
        obstacles.append(
            f"--max-model-len {length} exceeds the {facts.max_positions} positions that the checkpoint was "
            f"made for; choose at most {facts.max_positions}."
        )
    limit = None if platform is None else platform.manifest.max_context
    if platform is not None and limit is not None and length > limit:
        obstacles.append(
            f"platform {platform.name!r} runs contexts of at most {limit} tokens, and {length} are asked for; "
            f"choose --max-model-len {limit}, or another --platform."
        )
    if not options.enable_chunked_prefill and options.max_num_batched_tokens < length:
        obstacles.append(
            f"Without chunked prefill a prompt of up to {length} tokens must fit into one step, and "
            f"--max-num-batched-tokens is {options.max_num_batched_tokens}; raise it, lower --max-model-len, "
            "or leave out --no-enable-chunked-prefill."
        )
    return length, obstacles

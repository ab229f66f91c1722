"""Whether a step is planned while the one before it runs."""

from __future__ import annotations

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import PlatformManifest
from dovetail.plugins.registry import Entry


def decide(options: EngineOptions, platform: Entry[PlatformManifest] | None) -> tuple[bool, list[str]]:
    """The decision, and obstacles. A speculator must know a step's tokens before it proposes what follows them."""
    speculates = options.speculative_config is not None
    if options.async_scheduling is None:
        return platform is not None and platform.manifest.asynchronous and not speculates, []
    if options.async_scheduling and speculates:
        return False, [
            "--async-scheduling plans a step before the last one's tokens are known, and --speculative-config drafts "
            "from those; leave one of them out."
        ]
    return options.async_scheduling, []

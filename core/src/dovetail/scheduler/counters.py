"""Counters: what the scheduler has done since the start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """See :class:`dovetail.messages.EngineStats`; prefix and prompt tokens count once per request."""

    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    steps: int = 0
    step_tokens: int = 0

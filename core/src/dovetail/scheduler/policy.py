"""SchedulingPolicy: who goes first, and therefore who is preempted first."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dovetail.errors import ConfigError
from dovetail.scheduler.request import Request


class SchedulingPolicy(ABC):
    """A total order of requests.

    Waiting requests are admitted from the lowest key on, running ones get tokens in the same order, and when
    blocks run out the running request with the highest key is preempted. A request keeps its key when it is
    preempted, so that two requests never take turns in preempting each other.
    """

    @abstractmethod
    def key(self, request: Request) -> tuple[int, ...]:
        """The request's rank; constant over its life and unique."""
        ...


class FirstComeFirstServed(SchedulingPolicy):
    """In order of arrival."""

    def key(self, request: Request) -> tuple[int, ...]:
        """The arrival's number."""
        return (request.number,)


class ByPriority(SchedulingPolicy):
    """Lower ``priority`` first, then in order of arrival."""

    def key(self, request: Request) -> tuple[int, ...]:
        """Priority, then the arrival's number."""
        return (request.priority, request.number)


POLICIES: dict[str, type[SchedulingPolicy]] = {"fcfs": FirstComeFirstServed, "priority": ByPriority}


def policy_named(name: str) -> SchedulingPolicy:
    """The policy that ``--scheduling-policy`` names.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"--scheduling-policy is {name!r}; choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]()

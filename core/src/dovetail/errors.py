"""Every error that Dovetail raises on purpose.

DovetailError
├── ConfigError              an option, or a combination of options, that cannot be honoured
│   └── ResolutionError      the resolver's refusal, with every reason
├── PluginError              a plugin that cannot be used
│   ├── PluginLoadError      import, hook or contract failure, with plugin, distribution and version
│   ├── PluginRunError       a plugin that broke while it ran, with plugin, distribution and version
│   ├── PluginConflictError  two plugins register the same name
│   └── UnknownNameError     a name nobody registered
├── ModelLoadError           checkpoint files that do not fit the model
├── RequestError             one request is unacceptable; the server goes on (HTTP 400)
│   ├── ContextLengthError   prompt plus output exceed the context
│   └── UnknownModelError    the request names a model that is not served (HTTP 404)
├── EngineOverloadedError    the server drains or its queue is full (HTTP 503)
└── EngineDeadError          the engine process is gone (HTTP 500)

A message says what happened, with which value, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class DovetailError(Exception):
    """Base of every deliberate error."""


class ConfigError(DovetailError):
    """An option, or a combination of options, that cannot be honoured."""


class ResolutionError(ConfigError):
    """The resolver's refusal. ``reasons`` holds one line per obstacle, ``nearest`` one about what would work."""

    def __init__(self, headline: str, reasons: Sequence[str], nearest: str = "") -> None:
        self.headline = headline
        self.reasons = tuple(reasons)
        self.nearest = nearest
        closing = [nearest] if nearest else []
        super().__init__("\n".join([headline, *(f"  - {reason}" for reason in self.reasons), *closing]))


class PluginError(DovetailError):
    """A plugin that cannot be used."""


class PluginLoadError(PluginError):
    """A plugin that failed to import, to register, or to keep its contract."""


class PluginRunError(PluginError):
    """A plugin that broke, or broke its contract, while it ran."""


class PluginConflictError(PluginError):
    """Two plugins register the same name."""


class UnknownNameError(PluginError, LookupError):
    """A name that nobody registered."""


class ModelLoadError(DovetailError):
    """Checkpoint files that do not fit the model."""


class RequestError(DovetailError):
    """One request is unacceptable; nothing else is affected.

    Args:
        message: what is wrong, with the value and the remedy.
        param: the request field at fault, in the API's spelling.
        code: a machine-readable code of OpenAI's vocabulary, if one fits.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """Prompt plus requested output exceed the model's context."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    def __init__(self, name: str, served: Sequence[str]) -> None:
        message = f"The model `{name}` does not exist. Served here: {', '.join(f'`{s}`' for s in served)}."
        super().__init__(message, param="model", code="model_not_found")


class EngineOverloadedError(DovetailError):
    """The server is draining, or its queue is full."""


class EngineDeadError(DovetailError):
    """The engine process is gone; every request in flight has failed."""

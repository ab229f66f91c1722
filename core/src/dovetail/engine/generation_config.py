"""generation_config.json: the sampling parameters that a checkpoint's authors recommend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.checkpoint import read_object
from dovetail.errors import ConfigError, RequestError
from dovetail.sampling_params import SamplingParams

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def recommended_params(path: Path) -> dict[str, Any]:
    """Values for :class:`SamplingParams` that the checkpoint recommends; empty where it says nothing.

    ``do_sample: false`` means greedy. Fields that Dovetail does not have are passed over.

    Raises:
        ConfigError: the file is malformed, or a value is out of its range.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    config = read_object(file)
    values = {ours: config[theirs] for theirs, ours in _NAMES.items() if config.get(theirs) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{file} recommends unusable sampling parameters: {error}") from error
    return values

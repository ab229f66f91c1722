"""Where a checkpoint lies, and what its small JSON files say. Torch-free.

A checkpoint is a folder in Hugging Face layout: config.json, safetensors files, and usually a tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError
from dovetail.options import EngineOptions
from dovetail.plugins.registry import Registries

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TOKENIZER = [pattern for pattern in _WANTED if pattern != "*.safetensors"]
_UNWANTED = ["original/*", "metal/*", "onnx/*"]


def select(options: EngineOptions, registries: Registries) -> tuple[Path, str]:
    """The folder of the model that the options ask for, and the name that users know it by.

    Without a model, that is the embedded demo with the highest priority.

    Raises:
        ConfigError: there is no such folder or hub model, or no demo is installed.
    """
    if options.model is not None:
        return locate(options.model, options.revision), options.model
    for entry in registries.models.ranked():
        if entry.manifest.demo is not None:
            path = demo(entry.manifest.demo)
            return path, path.name
    raise ConfigError(
        "No model is named, and no installed plugin brings a demo model. "
        "Name a checkpoint folder or hub id, or install dovetail-models."
    )


def locate(model: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (or found in the hub's cache) first.

    Raises:
        ConfigError: neither a checkpoint folder nor a hub model that can be had.
    """
    path = local(model)
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"The folder {model} holds no config.json, so it is not a checkpoint in Hugging Face layout. "
                "Name the folder that holds config.json and the .safetensors files."
            )
        return path
    if path.is_file():
        raise ConfigError(
            f"{model} is a file; name the checkpoint's folder, which holds config.json and .safetensors."
        )
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"There is no folder {model}, and it is no hub id (owner/name) either. Check the path."
        )
    return locate(str(_download(model, revision, _WANTED)))


def local(name: str) -> Path:
    """A name as a path on this machine, whether something is there or not.

    Raises:
        ConfigError: no file system could have it.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        raise ConfigError(f"The path {name[:200]} cannot be looked at: {error} Check it.") from error
    return path


def is_hub_id(model: str) -> bool:
    """Whether it looks like a model of the hub."""
    return _HUB_ID.fullmatch(model) is not None


def in_cache(model: str, revision: str | None = None) -> Path | None:
    """The local folder of a hub model that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def locate_tokenizer(tokenizer: str) -> Path:
    """The local folder of a tokenizer that is not beside its model; weights are not downloaded.

    Raises:
        ConfigError: neither a folder nor a hub model that can be had.
    """
    path = local(tokenizer)
    if tokenizer and path.is_dir():
        return path
    if not _HUB_ID.fullmatch(tokenizer):
        raise ConfigError(
            f"There is no tokenizer folder {tokenizer}, and it is no hub id (owner/name) either. Check the path."
        )
    return _download(tokenizer, None, _TOKENIZER)


def demo(location: str) -> Path:
    """The folder of a demo checkpoint, given as ``"package:folder"``.

    Raises:
        ConfigError: the package does not hold it.
    """
    package, _, folder = location.partition(":")
    try:
        path = Path(str(files(package))) / folder
    except (ImportError, ValueError) as error:
        raise ConfigError(f"The demo model {location} cannot be had, since its package cannot: {error}.") from error
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"The demo model {location} is missing from its package (looked in {path}); reinstall it."
        )
    return path


def read_config(path: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    return read_object(path / "config.json")


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The model classes that a config.json names.

    Raises:
        ConfigError: it names none, or something else than a list of names stands there.
    """
    names = config.get("architectures")
    if not names:
        raise ConfigError("config.json names no architectures; add the model class's name to it.")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"architectures in config.json is {names!r}; it must be a list of names.")
    return names


def eos_token_ids(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a sequence: generation_config.json's, else config.json's, else none.

    Raises:
        ConfigError: the entry is neither a token id nor a list of them.
    """
    generation = path / "generation_config.json"
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if generation.is_file():
        sources.append(("generation_config.json", read_object(generation)))
    sources.append(("config.json", config))
    nested = config.get("text_config")
    if isinstance(nested, dict):
        sources.append(("config.json", nested))
    for file, source in sources:
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ConfigError(
                f"eos_token_id in {path / file} is {value!r}; it must be a token id or a list of them."
            )
        return tuple(ids)
    return ()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConfigError: it is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint needs it.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; it must hold an object.")
    return value


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = f"{model} (revision {revision})" if revision else model
    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED
        )
    except Exception as error:
        details = str(error).strip().splitlines() or ["no details"]
        raise ConfigError(
            f"There is no folder {model}, and the hub model {wanted} cannot be had: "
            f"{type(error).__name__}: {details[0].rstrip('. ')}. "
            "Check the name, the network, and HF_TOKEN for gated models; or name a local folder."
        ) from error
    return Path(folder)

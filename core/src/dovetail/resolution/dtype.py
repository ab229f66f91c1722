"""Which activation dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.errors import DovetailError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import ModelManifest, PlatformManifest
from dovetail.resolution.decision import Decision, either

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts


def decide(
    options: EngineOptions,
    chip: Decision[PlatformManifest],
    family: Decision[ModelManifest],
    facts: ModelFacts | None,
) -> tuple[str | None, list[str]]:
    """The dtype's name, and obstacles. ``auto`` asks the platform, given the checkpoint's."""
    if chip.entry is None:
        return (None if options.dtype == "auto" else options.dtype), []
    if options.dtype != "auto":
        return options.dtype, _gaps(options.dtype, chip, family)
    if facts is None:
        return None, []
    return _default(chip, family, facts)


def kv_gaps(options: EngineOptions, chip: Decision[PlatformManifest], dtype: str | None) -> list[str]:
    """Why the platform cannot hold the KV cache in the dtype asked for."""
    if chip.entry is None or not chip.entry.manifest.kv_dtypes:
        return []
    choices, wanted = chip.entry.manifest.kv_dtypes, options.kv_cache_dtype
    if wanted in choices or (wanted == dtype and "auto" in choices):
        return []
    return [
        f"platform {chip.entry.name!r} cannot hold the KV cache as {wanted}; "
        f"choose --kv-cache-dtype {either(choices)}, or another --platform."
    ]


def _gaps(dtype: str, chip: Decision[PlatformManifest], family: Decision[ModelManifest]) -> list[str]:
    """Why an explicit dtype cannot be had."""
    assert chip.entry is not None
    gaps = []
    supported = chip.entry.manifest.dtypes
    if dtype not in supported:
        choices = either(["auto", *supported])
        gaps.append(f"platform {chip.entry.name!r} does not compute in --dtype {dtype}; choose {choices}.")
    right = () if family.entry is None else family.entry.manifest.dtypes
    if family.entry is not None and right and dtype not in right:
        gaps.append(
            f"model family {family.entry.name!r} does not compute right in --dtype {dtype}; "
            f"choose {either(['auto', *right])}."
        )
    return gaps


def _default(
    chip: Decision[PlatformManifest], family: Decision[ModelManifest], facts: ModelFacts
) -> tuple[str | None, list[str]]:
    """The platform's own choice; where the family does not compute right in it, the platform's first that fits."""
    assert chip.entry is not None
    assert family.entry is not None
    supported, owner = chip.entry.manifest.dtypes, f"platform {chip.entry.name!r}"
    try:
        dtype = str(chip.loaded.default_dtype(facts.dtype)).removeprefix("torch.")
    except DovetailError as error:
        return None, [str(error)]
    except (Exception, SystemExit) as error:  # noqa: BLE001  the plugin's failure, and the reason to refuse
        return None, [f"{owner} names no default dtype: {type(error).__name__}: {error}; set --dtype."]
    if dtype not in supported:
        return None, [
            f"{owner} answers --dtype auto with {dtype}, which its own manifest does not list; "
            f"choose --dtype {either(supported)}, and report this to {chip.entry.distribution}."
        ]
    right = family.entry.manifest.dtypes
    if not right or dtype in right:
        return dtype, []
    shared = [name for name in supported if name in right]
    if shared:
        return shared[0], []
    return None, [
        f"model family {family.entry.name!r} computes right in {either(right)} alone, and {owner} in "
        f"{either(supported)}; choose another --platform."
    ]

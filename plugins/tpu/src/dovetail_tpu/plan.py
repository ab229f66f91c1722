"""``dovetail plan --tpu SLICE MODEL``: whether a model, its context and its batch fit on a slice, and over how many of
its devices.

Nothing is loaded and no chip is there: the largest step is compiled for the slice, and its compiler says what it takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import click

from dovetail.cli.options import json_option, with_options
from dovetail.cli.section_options import EngineCommand
from dovetail.config import EngineConfig
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.plugins.requirements import explain_unmet
from dovetail.resolver import resolve
from dovetail.sizes import size
from dovetail_tpu import bridges
from dovetail_tpu.slices import Slice, slice_of

if TYPE_CHECKING:
    from dovetail_tpu.trial import Trial

NEEDS = (*bridges.NEEDS["jax"], "libtpu")
BUNDLE = "dovetail-tpu[jax,aot]"
"""What brings all of them."""
ONE_DEVICE = "The bridge torch_xla runs on one device; --tpu-bridge jax spreads a model over several."


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """What a configuration takes of each device, over so many of them.

    Attributes:
        devices: of the mesh.
        weights: bytes, with the inputs of a step.
        cache: bytes of as many full contexts as may run, or of what ``--kv-cache-memory`` says.
        room: bytes that an engine may take: ``--memory-fraction`` of the device's.
        temp: bytes that the largest step takes besides; None if weights and cache alone do not fit.
        code: bytes of all programs, none larger than that one's.
        tokens: of context that fit beside weights and step; None if it was not compiled.
        fault: why it cannot run; empty if it can.
    """

    devices: int
    weights: int
    cache: int
    room: int
    temp: int | None = None
    code: int | None = None
    tokens: int | None = None
    fault: str = ""

    @property
    def total(self) -> int:
        """Bytes of a device that are taken."""
        return self.weights + self.cache + (self.temp or 0) + (self.code or 0)

    @property
    def fits(self) -> bool:
        """Whether all of it does."""
        return not self.fault


def plan(config: EngineConfig, target: Slice) -> list[Mesh]:
    """The meshes that were looked at, fewest devices first; if one fits, it is the last.

    Args:
        config: of an engine on platform ``tpu``; a number of devices in it is the only mesh that is looked at.
        target: the slice.

    Raises:
        ConfigError: the slice has not so many devices, or what decides is not counted here.
    """
    if config.draft is not None:
        raise ConfigError("What a draft model takes is not counted: leave out --speculative-config, and leave room.")
    meshes: list[Mesh] = []
    for count in _counts(config, target):
        meshes.append(_mesh(config, target, count))
        if meshes[-1].fits:
            break
    return meshes


def _is_of_one(config: EngineConfig) -> bool:
    """Whether no more than one device is of use."""
    return str(config.platform_options["bridge"]) == "torch_xla"


def _counts(config: EngineConfig, target: Slice) -> list[int]:
    asked = str(config.platform_options["devices"])
    if _is_of_one(config):
        if asked not in (bridges.AUTO, "1"):
            raise ConfigError(f"--tpu-devices is {asked}. {ONE_DEVICE}")
        return [1]
    if asked == bridges.AUTO:
        return [n for n in range(1, target.devices + 1) if target.devices % n == 0]
    if asked.isdecimal() and 1 <= int(asked) <= target.devices:
        return [int(asked)]
    raise ConfigError(
        f"--tpu-devices is {asked}, and {target.name} has {target.devices}; give a number from 1 to that, or none."
    )


def _mesh(config: EngineConfig, target: Slice, devices: int) -> Mesh:
    from dovetail_tpu.trial import Trial  # torch and JAX, which a wrong name of a slice should not wait for

    room = _room(config, target)
    try:
        trial = Trial(config, target, devices)
    except ConfigError as error:
        return Mesh(devices=devices, weights=0, cache=0, room=room, fault=str(error))
    blocks = _blocks(config, trial, devices)
    mesh = Mesh(devices=devices, weights=trial.weight_bytes, cache=blocks * trial.block_bytes, room=room)
    if mesh.total > room:
        return replace(mesh, fault=_shortage(mesh))
    if blocks <= (trial.full - 1) // config.max_num_seqs:
        return replace(mesh, fault="The cache does not hold one request: raise --kv-cache-memory.")
    largest = (config.max_num_batched_tokens, config.max_num_seqs)
    try:
        (program,) = trial.compile([largest], blocks, ruled=True)
    except ConfigError as error:
        return replace(mesh, fault=str(error))
    mesh = replace(mesh, temp=program.memory.temp, code=trial.programs * program.memory.code)
    tokens = ((room - mesh.total) // trial.block_bytes + blocks - 1) * config.block_size
    return replace(mesh, tokens=tokens, fault=_shortage(mesh) if mesh.total > room else "")


def _room(config: EngineConfig, target: Slice) -> int:
    """As an engine counts: where somebody says how large the cache is, all of the device."""
    from dovetail.runner.kv_memory import DEDICATED

    share = DEDICATED if config.memory_fraction is None else config.memory_fraction
    return target.chip.hbm_bytes if config.kv_cache_memory is not None else int(target.chip.hbm_bytes * share)


def _blocks(config: EngineConfig, trial: Trial, devices: int) -> int:
    if config.kv_cache_memory is None:
        return trial.full
    return config.kv_cache_memory // (devices * trial.block_bytes)


def _shortage(mesh: Mesh) -> str:
    """What is missing, and what would help."""
    return (
        f"{size(mesh.total - mesh.room)} are missing: lower --max-num-seqs, --max-model-len or "
        "--max-num-batched-tokens, quantize the weights, or take more chips."
    )


def report(config: EngineConfig, target: Slice, meshes: Sequence[Mesh]) -> str:
    """The meshes as a table, and what follows."""
    head = f"{'devices':>7}  {'weights':>10}  {'cache':>10}  {'step':>10}  {'taken':>10}  {'of':>10}"
    lines = [
        f"{config.model_name} on {target.name}: {target.chips} × {target.chip.name}, {target.devices} devices of "
        f"{size(target.chip.hbm_bytes)} each, of which an engine takes {size(meshes[0].room)}",
        f"{config.max_num_seqs} requests × {config.max_model_len} tokens, steps of up to "
        f"{config.max_num_batched_tokens} tokens, {config.dtype}, weights {config.quant.name}, cache {config.kv_dtype}",
        "",
        head,
    ]
    for mesh in meshes:
        step = "-" if mesh.temp is None else size(mesh.temp + (mesh.code or 0))
        cells = (size(mesh.weights), size(mesh.cache), step, size(mesh.total), size(mesh.room))
        lines.append(f"{mesh.devices:>7}  " + "  ".join(f"{cell:>10}" for cell in cells))
    if _is_of_one(config):
        lines += ["", ONE_DEVICE]
    last = meshes[-1]
    if not last.fits:
        return "\n".join([*lines, "", f"It does not fit: {last.fault}"])
    over = f"{last.devices} of {target.devices} devices"
    verdict = f"It fits over {over}, which have room for {last.tokens} tokens of context."
    return "\n".join([*lines, "", verdict, f"Run it with --tpu-devices {last.devices}."])


@click.command(name="plan", cls=EngineCommand)
@with_options(EngineOptions)
@click.option("--tpu", "name", required=True, metavar="SLICE", help="The slice, e.g. v6e-8.")
@json_option
def command(options: EngineOptions, name: str, as_json: bool) -> int:
    """Say whether a model, its context and its batch fit on a TPU slice, without one.

    The exit code is 0 if they do, and 1 if not.
    """
    target = slice_of(name)
    missing = explain_unmet(NEEDS, BUNDLE)
    if missing:
        raise ConfigError(f"Compiling for a chip that is not here {missing}.")
    if options.platform not in ("auto", "tpu"):
        raise ConfigError(f"--platform is {options.platform!r}, and --tpu asks about platform 'tpu'; drop one.")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a chip that is there is left alone
    asked = replace(options, platform="tpu", load_format="dummy")
    config = resolve(asked, PluginHost().discover().registries)
    meshes = plan(config, target)
    if as_json:
        found = [asdict(mesh) | {"total": mesh.total, "fits": mesh.fits} for mesh in meshes]
        click.echo(json.dumps({"model": config.model_name, "slice": target.name, "meshes": found}, indent=2))
    else:
        click.echo(report(config, target, meshes))
    return 0 if meshes[-1].fits else 1

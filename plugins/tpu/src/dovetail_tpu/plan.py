"""``python -m dovetail_tpu.plan --tpu SLICE MODEL``: whether a model, its context and its batch fit on a slice, and
over how many of its devices.

Nothing is loaded and no chip is there: the largest step is compiled for the slice, and its compiler says what it takes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import click

from dovetail.cli.options import with_options
from dovetail.config import EngineConfig
from dovetail.errors import ConfigError, DovetailError
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.sizes import size
from dovetail_tpu.slices import Slice, slice_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """What a configuration takes of each device, over so many of them.

    Attributes:
        devices: of the mesh.
        weights: bytes, with the inputs of a step.
        cache: bytes of as many full contexts as may run.
        room: bytes that programs may use.
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


def plan(config: EngineConfig, target: Slice, devices: int | None = None) -> list[Mesh]:
    """The meshes that were looked at, fewest devices first; if one fits, it is the last.

    Args:
        config: of an engine on platform ``tpu``.
        target: the slice.
        devices: look at a mesh of so many alone.
    """
    counts = [n for n in range(1, target.devices + 1) if target.devices % n == 0] if devices is None else [devices]
    meshes: list[Mesh] = []
    for count in counts:
        meshes.append(_mesh(config, target, count))
        if meshes[-1].fits:
            break
    return meshes


def _mesh(config: EngineConfig, target: Slice, devices: int) -> Mesh:
    from dovetail_tpu.trial import Trial  # torch and JAX, which a wrong name of a slice should not wait for

    room = target.chip.hbm_bytes
    try:
        trial = Trial(config, target, devices)
    except ConfigError as error:
        return Mesh(devices=devices, weights=0, cache=0, room=room, fault=str(error))
    mesh = Mesh(devices=devices, weights=trial.weight_bytes, cache=trial.full * trial.block_bytes, room=room)
    if mesh.total > room:
        return replace(mesh, fault=_shortage(mesh))
    largest = (config.max_num_batched_tokens, config.max_num_seqs)
    try:
        (program,) = trial.compile([largest], trial.full, ruled=True)
    except ConfigError as error:
        return replace(mesh, fault=str(error))
    mesh = replace(mesh, temp=program.memory.temp, code=trial.programs * program.memory.code)
    blocks = (room - mesh.total) // trial.block_bytes + trial.full - 1
    return replace(mesh, tokens=blocks * config.block_size, fault=_shortage(mesh) if mesh.total > room else "")


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
        f"{size(target.chip.hbm_bytes)} each",
        f"{config.max_num_seqs} requests × {config.max_model_len} tokens, steps of up to "
        f"{config.max_num_batched_tokens} tokens, {config.dtype}",
        "",
        head,
    ]
    for mesh in meshes:
        step = "-" if mesh.temp is None else size(mesh.temp + (mesh.code or 0))
        cells = (size(mesh.weights), size(mesh.cache), step, size(mesh.total), size(mesh.room))
        lines.append(f"{mesh.devices:>7}  " + "  ".join(f"{cell:>10}" for cell in cells))
    last = meshes[-1]
    if not last.fits:
        return "\n".join([*lines, "", f"It does not fit: {last.fault}"])
    over = f"{last.devices} of {target.devices} devices"
    verdict = f"It fits over {over}, which have room for {last.tokens} tokens of context."
    return "\n".join([*lines, "", verdict, f"Run it with --platform-config '{{\"devices\": {last.devices}}}'."])


@click.command(name="plan")
@with_options(EngineOptions)
@click.option("--tpu", "name", required=True, metavar="SLICE", help="The slice, e.g. v6e-8.")
@click.option("--devices", type=click.IntRange(1), help="Look at a mesh of so many devices alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(options: EngineOptions, name: str, devices: int | None, as_json: bool) -> int:
    """Say whether a model, its context and its batch fit on a TPU slice, without one."""
    target = slice_of(name)
    os.environ["JAX_PLATFORMS"] = "cpu"  # a chip that is there is left alone
    asked = replace(options, platform="tpu", load_format="dummy")
    config = resolve(asked, PluginHost().discover().registries)
    meshes = plan(config, target, devices)
    if as_json:
        found = [asdict(mesh) | {"total": mesh.total, "fits": mesh.fits} for mesh in meshes]
        click.echo(json.dumps({"model": config.model_name, "slice": target.name, "meshes": found}, indent=2))
    else:
        click.echo(report(config, target, meshes))
    return 0 if meshes[-1].fits else 1


def main() -> None:
    """Run it as a program: 0 if it fits, 1 if not, 2 if it was asked wrongly."""
    try:
        sys.exit(command.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DovetailError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""``dovetail new``: a plugin package that runs, to start from.

The templates are complete packages of a plugin called ``sketch``; making one is copying it under another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from dovetail.errors import ConfigError

TEMPLATES = Path(__file__).parents[1] / "templates"
COMMON = "common"
KINDS = {
    "platform": "explain --platform {name}",
    "attention": "explain --attention {name}",
    "model": "plugins",
    "quant": "explain --quantization {name}",
    "specdec": 'explain --speculative-config \'{{"method": "{name}"}}\'',
    "command": "{name} --help",
}
"""What can be made, and what shows that it is found; a model is, by its checkpoint."""
LONGEST_NAME = 40
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option("--path", type=click.Path(path_type=Path), help="Folder to write into.  [default: dovetail-NAME]")
def new(kind: str, name: str, path: Path | None) -> None:
    """Write a plugin package that runs, with the conformance suite of its contract.

    NAME is what users will type; the distribution becomes dovetail-NAME.
    """
    check_name(name)
    folder = path if path is not None else Path(f"dovetail-{name}")
    written = scaffold(kind, name, folder)
    click.echo(f"Wrote {len(written)} files into {folder}:")
    for file in written:
        click.echo(f"  {file}")
    click.echo("\nNext:\n" + "\n".join(f"  {line}" for line in _next_steps(kind, name, folder)))


def check_name(name: str) -> None:
    """Whether a plugin can be called this, here.

    Raises:
        ConfigError: it cannot, or something installed is; the message says what would do.
    """
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("dovetail-"))[:LONGEST_NAME]
        plain = plain.lstrip("-0123456789").rstrip("-")
        hint = f"; {plain!r} would do" if _NAME.fullmatch(plain) else ""
        raise ConfigError(
            f"{name!r} cannot be the name of a plugin. Take at most {LONGEST_NAME} lower-case letters, digits and "
            f"single dashes, beginning with a letter{hint}."
        )
    if name.startswith("dovetail-"):
        raise ConfigError(f"{name!r} would become dovetail-{name}; leave out the prefix.")
    _check_free(name)


def _check_free(name: str) -> None:
    from dovetail.plugins.host import PluginHost

    registries = PluginHost().discover(warn=False).registries
    owners = [plugin.owner for plugin in registries.plugins if plugin.name == name]
    owners += [registry.get(name).owner for registry in registries.by_kind().values() if name in registry]
    if owners:
        raise ConfigError(f"{name!r} is taken by the installed {owners[0]}; choose another name, or uninstall that.")


def scaffold(kind: str, name: str, folder: Path) -> list[str]:
    """Write the package; returns its files, relative to ``folder``.

    Raises:
        ConfigError: the folder holds files already, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; nothing was written. Give another --path.")
    files = dict(_files(kind, name))
    try:
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); give another --path.") from error
    return sorted(files)


def _files(kind: str, name: str) -> Iterator[tuple[str, str]]:
    for root in (TEMPLATES / COMMON, TEMPLATES / kind):
        for file in sorted(root.rglob("*")):
            place = file.relative_to(root)
            if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in place.parts):
                yield renamed(place.as_posix(), name), renamed(file.read_text(encoding="utf-8"), name)


def renamed(text: str, name: str) -> str:
    """Text of a template with the plugin's name in its three forms: module, class, and as users type it."""
    forms = {
        "dovetail_sketch": f"dovetail_{name.replace('-', '_')}",
        "Sketch": "".join(part.capitalize() for part in name.split("-")),
        "sketch": name,
    }
    return re.sub("|".join(forms), lambda found: forms[found[0]], text)


def _next_steps(kind: str, name: str, folder: Path) -> list[str]:
    return [
        f"cd {folder}",
        "pip install -e '.[test]'",
        "pytest",
        f"dovetail conformance {name}",
        f"dovetail {KINDS[kind].format(name=name)}",
    ]

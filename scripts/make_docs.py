"""Write docs/reference from the code, and the lifecycles on the pages about plugins.

Run ``.venv/bin/python scripts/make_docs.py`` after a change; a test compares the files with what this script writes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))  # also where a test runs this file

import conformance
import lifecycle
import support

from dovetail import env, hookspecs
from dovetail.cli import plugin_commands
from dovetail.cli.bench.group import bench
from dovetail.cli.main import cli
from dovetail.contracts import API_VERSIONS
from dovetail.contracts.executor import Executor
from dovetail.contracts.ops import OpTable
from dovetail.ops import reference
from dovetail.options import EngineOptions, ServerOptions, flag
from dovetail.plugins.host import BUILTIN, HOOKS, Hook
from dovetail.plugins.manifest import Manifest

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "reference"
NOTICE = "<!-- Written by scripts/make_docs.py from the code. Do not edit. -->\n"
KINDS = {"int": "whole number", "float": "number", "str": "text", "bool": "switch"}
CONTRACT = re.compile(r":class:`([\w.]+)\.(\w+)`")


def main() -> None:
    """Write every file."""
    written = {FOLDER / name: text for name, text in pages().items()} | plugin_pages()
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}\n")


def pages() -> dict[str, str]:
    """The files by name."""
    return {
        "hooks.md": hooks(),
        "options.md": options(),
        "environment.md": environment(),
        "ops.md": ops(),
        "conformance.md": conformance.page(NOTICE, table, plain),
        "support.md": support.page(NOTICE, table),
    }


def plugin_pages() -> dict[Path, str]:
    """The pages on contracts, each with its lifecycle drawn anew."""
    drawn: dict[str, tuple[type, str | None]] = {"executor": (Executor, None)}
    for hook in HOOKS:
        if methods(contract_of(hook)):
            drawn[hook.contract] = (contract_of(hook), hook.name)
    paths = {DOCS / "plugins" / f"{name}.md": contract for name, contract in drawn.items()}
    return {path: lifecycle.fill(path.read_text(encoding="utf-8"), *contract) for path, contract in paths.items()}


def contract_of(hook: Hook) -> type:
    """The class that a hook's implementations derive from; its docstring names it."""
    found = CONTRACT.search(inspect.getdoc(getattr(hookspecs, hook.name)) or "")
    assert found, f"{hook.name} does not name its contract"
    contract = getattr(import_module(found[1]), found[2])
    assert isinstance(contract, type)
    return contract


def ops() -> str:
    """Every operation of the op table, with its parameters and meaning."""
    rows = []
    for field in fields(OpTable):
        function = getattr(reference, field.name)
        parameters = ", ".join(inspect.signature(function).parameters)
        rows.append([f"`{field.name}({parameters})`", first_line(function)])
    intro = "The specification of each is the function of this name in `dovetail.ops.reference`.\n"
    return "\n".join([NOTICE, "# Operations\n", intro, table(("operation", "meaning"), rows)])


def hooks() -> str:
    """Hooks, what they register, and the methods behind it."""
    parts = [NOTICE, "# Hooks\n", prose(hookspecs.__doc__ or ""), manifest_section(Manifest, "Every manifest")]
    parts += [hook_section(hook) for hook in HOOKS]
    return "\n".join(parts)


def hook_section(hook: Hook) -> str:
    """One hook: its docstring, its manifest and its contract."""
    spec = getattr(hookspecs, hook.name)
    doc = inspect.getdoc(spec) or ""
    contract = contract_of(hook)
    summary, _, facts = doc.partition("\n\n")
    page = hook.contract
    parts = [
        f"## {hook.name}\n",
        f"{plain(summary)} Guide: [{page}.md](../plugins/{page}.md).\n",
        table(("fact", "value"), [part.split(": ", 1) for part in re.split(r"\.\s+", plain(facts).rstrip("."))]),
        manifest_section(hook.manifest, "Manifest"),
        f"### Contract: `{contract.__name__}`, version {API_VERSIONS[hook.contract]}\n",
    ]
    if not methods(contract):
        return "\n".join([*parts, f"`{contract.__module__}`, as it is; there is nothing to define.\n"])
    rows = [[f"`{signature(contract, name)}`", method_line(contract, name)] for name in methods(contract)]
    parts.append(f"`{contract.__module__}`. {first_line(contract)}\n")
    return "\n".join([*parts, table(("method", "meaning"), rows)])


def manifest_section(manifest: type[Manifest], title: str) -> str:
    """The fields that a manifest adds to its base."""
    described = dict(attributes(manifest))
    inherited = set() if manifest is Manifest else {field.name for field in fields(Manifest)}
    rows = [
        [f"`{field.name}`", f"`{field.type}`", default(field), described[field.name]]
        for field in fields(manifest)
        if field.name not in inherited
    ]
    level = "##" if manifest is Manifest else "###"
    body = table(("field", "type", "default", "meaning"), rows) if rows else "Nothing beyond those of every manifest.\n"
    return "\n".join([f"{level} {title}: `{manifest.__name__}`\n", body])


def attributes(cls: type) -> Iterator[tuple[str, str]]:
    """Names and meanings in the ``Attributes`` section of a docstring; ``a, b: text`` describes both."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    for entry in re.split(r"\n(?=    \w)", "\n" + section.rstrip()):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            yield name, plain(text)


def default(field: Any) -> str:
    """A field's default, as code."""
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory()!r}`"


def methods(contract: type) -> list[str]:
    """What an implementation must define, in the order of the source."""
    return [name for name in vars(contract) if name in getattr(contract, "__abstractmethods__", ())]


def method_line(contract: type, name: str) -> str:
    """The first sentence of a method's docstring."""
    return first_line(inspect.getattr_static(contract, name))


def first_line(described: Any) -> str:
    """The first line of a docstring that is prose."""
    return plain((inspect.getdoc(described) or "").splitlines()[0])


def signature(contract: type, name: str) -> str:
    """``name(parameters)``; a property is its name."""
    member = inspect.getattr_static(contract, name)
    if isinstance(member, property):
        return name
    function = inspect.unwrap(getattr(member, "__func__", member))
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    names = [p.name for p in parameters]
    if any(p.kind is p.KEYWORD_ONLY for p in parameters):
        names.insert(0, "*")
    return f"{name}({', '.join(names)})"


def options() -> str:
    """Options of engine and server, and of the other commands."""
    parts = [
        NOTICE,
        "# Options\n",
        "Options of the engine are taken by `serve`, `generate`, `warmup`, `explain`, `doctor`, `plan`, `bench "
        "throughput`, `bench latency` and `bench startup`, and as keyword arguments by `LLM`. A YAML file takes the "
        "same names: `dovetail serve --config FILE.yaml`, with one `option: value` per line; dashes and underscores "
        "are the same. The command line comes before the file, and the file before the defaults. An unknown key is an "
        "error.\n",
        "## Engine\n",
        option_table(EngineOptions),
        "## Server\n",
        option_table(ServerOptions),
        "## Commands\n",
        "Options of `dovetail` itself, which come before the command:\n",
        command_table(cli),
    ]
    shared = {field.name for cls in (EngineOptions, ServerOptions) for field in fields(cls)}
    origins = {entry.name: entry.distribution for entry in support.registries().commands if entry.plugin != BUILTIN}
    for name, command in commands():
        takes_engine = any(parameter.name == "block_size" for parameter in command.params)
        own = [p for p in command.params if not (takes_engine and p.name in shared - {"log_level"})]
        takes_server = any(parameter.name == "max_waiting" for parameter in command.params)
        if takes_server:
            own = [p for p in own if p.name not in shared]
        summary = plain((command.help or "").split("\n\n")[0])
        summary += f" It comes with {origins[name]}." if name in origins else ""
        also = " Takes the engine's and the server's options, and:" if takes_server else (
            " Takes the engine's options, and:" if takes_engine else ""
        )  # fmt: skip
        parts += [f"### dovetail {name}\n", f"{summary}{also}\n", command_table(own)]
    return "\n".join(parts)


def option_table(cls: type) -> str:
    """Fields of an options class."""
    rows = []
    for field in fields(cls):
        name = "`MODEL` (argument)" if field.name == "model" else f"`{flag(field.name)}`"
        if field.type in ("bool", bool):
            name = f"`{flag(field.name)}`, `--no-{flag(field.name)[2:]}`"
        kind = field.metadata["metavar"] or " \\| ".join(field.metadata["choices"]) or str(field.type)
        kind = KINDS.get(kind.removesuffix(" | None"), kind)
        shown = "" if field.default is None else f"`{str(field.default).lower()}`"
        rows.append([name, kind, shown, field.metadata["help"]])
    return table(("option", "value", "default", "meaning"), rows)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of the plugins of this repository, those of ``bench`` included."""
    context = click.Context(cli)
    for entry in support.registries().commands:
        if entry.name != "bench":
            yield entry.name, plugin_commands.load(entry)
    for name in bench.list_commands(context):
        command = bench.get_command(context, name)
        assert command is not None
        yield f"bench {name}", command


def command_table(source: click.Command | list[click.Parameter]) -> str:
    """Options of a command line."""
    parameters = source.params if isinstance(source, click.Command) else source
    rows = []
    for parameter in parameters:
        if not isinstance(parameter, click.Option):
            continue
        spelling = ", ".join(f"`{spelling}`" for spelling in (*parameter.opts, *parameter.secondary_opts))
        shown = parameter.default if parameter.show_default else None
        rows.append([spelling, "" if shown is None else f"`{shown}`", parameter.help or ""])
    return table(("option", "default", "meaning"), rows)


def environment() -> str:
    """Environment variables, from the table in env.py."""
    doc = inspect.cleandoc(env.__doc__ or "")
    intro, rule, rest = doc.partition("====")
    assert rule, "env.py has no table"
    rows = []
    for variable, text in re.findall(r"^``(\w+)`` +(.+)$", rest, re.MULTILINE):
        rows.append([f"`{variable}`", setter(variable), plain(text)])
    parts = [NOTICE, "# Environment variables\n", plain(intro) + "\n", table(("variable", "option", "meaning"), rows)]
    return "\n".join(parts)


def setter(variable: str) -> str:
    """The option that sets a variable."""
    for parameter in [*cli.params, *(p for _, command in commands() for p in command.params)]:
        if isinstance(parameter, click.Option) and variable in (parameter.help or ""):
            return f"`{parameter.opts[-1]}`"
    raise AssertionError(f"{variable} is no option's")


def prose(doc: str) -> str:
    """A docstring of several paragraphs; ``::`` opens an indented block."""
    paragraphs = []
    for paragraph in inspect.cleandoc(doc).split("\n\n")[1:]:
        if paragraph.startswith("    "):
            paragraphs.append(f"```toml\n{inspect.cleandoc(paragraph)}\n```")
        else:
            paragraphs.append(plain(paragraph).replace("::", ":"))
    return "\n\n".join(paragraphs) + "\n"


def plain(text: str) -> str:
    """Markdown of a docstring's markup, on one line."""
    text = re.sub(r":(?:class|mod|meth|func):`~?([\w.]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def table(head: tuple[str, ...], rows: Any) -> str:
    """A markdown table."""
    cells = [[str(cell).replace("|", "\\|").replace("\\\\|", "\\|") for cell in row] for row in rows]
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in cells)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
